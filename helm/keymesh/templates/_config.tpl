{{/*
Configuration files, as JSON (which is YAML): whole numbers stay whole numbers that way.
*/}}

{{/* Arguments: root, entry, gateways, members (collected). */}}
{{- define "keymesh.memberConfig" -}}
{{- $root := .root -}}
{{- $entry := .entry -}}
{{- $values := $root.Values -}}
{{- $etcd := dict "endpoints" (include "keymesh.etcdEndpoints" $root | fromJson).endpoints "ca" "/etc/keymesh/etcd/ca.crt" "cert" "/etc/keymesh/etcd/tls.crt" "key" "/etc/keymesh/etcd/tls.key" -}}
{{- if $entry.etcdPasswordSecret -}}
{{- $_ := set $etcd "username" $entry.id -}}
{{- $_ := set $etcd "password_file" "/etc/keymesh/etcd-password/password" -}}
{{- end -}}
{{- $network := dict "operator_public_key" "operator.pub.pem" -}}
{{- if include "keymesh.trustsDirectory" $root -}}
{{- $network = dict "trust_directory" true -}}
{{- end -}}
{{- $links := list -}}
{{- range $entry.links -}}
{{- $link := dict "peer" .peer -}}
{{- with .poolMaxBytes -}}{{- $_ := set $link "pool_max_bytes" (int64 .) -}}{{- end -}}
{{- with .windowBytes -}}{{- $_ := set $link "window_bytes" (int64 .) -}}{{- end -}}
{{- with .lowWaterBytes -}}{{- $_ := set $link "low_water_bytes" (int64 .) -}}{{- end -}}
{{- with .device -}}
{{- $folder := printf "/etc/keymesh/devices/%s" .secret -}}
{{- $device := dict "url" .url "sae_id" .saeId "ca" (printf "%s/ca.crt" $folder) "cert" (printf "%s/tls.crt" $folder) "key" (printf "%s/tls.key" $folder) -}}
{{- with .keySizeBits -}}{{- $_ := set $device "key_size_bits" (int64 .) -}}{{- end -}}
{{- with .timeoutSeconds -}}{{- $_ := set $device "timeout_s" . -}}{{- end -}}
{{- $_ := set $link "device" $device -}}
{{- end -}}
{{- $links = append $links $link -}}
{{- end -}}
{{- $gatewayIds := list -}}
{{- range .gateways -}}{{- if eq .node $entry.id -}}{{- $gatewayIds = append $gatewayIds .id -}}{{- end -}}{{- end -}}
{{- $advertise := $entry.advertise | default (printf "%s:%d" (include "keymesh.host" (dict "root" $root "name" $entry.name)) (int $entry.service.port)) -}}
{{- $config := dict
  (printf "%s_id" (ternary "hub" "kme" (eq $entry.role "hub"))) $entry.id
  "domain_id" $values.domain
  "data_dir" (include "keymesh.dataDir" .)
  "proof_dir" "/run/keymesh"
  "listen" (dict "grpc" (printf "%s:7001" $values.listenHost) "http" (printf "%s:7080" $values.listenHost))
  "advertise" $advertise
  "tls" (dict "ca" "/etc/keymesh/tls/ca.crt" "cert" "/etc/keymesh/tls/tls.crt" "key" "/etc/keymesh/tls/tls.key" "deny_list" "deny.txt")
  "directory" (dict "etcd" $etcd)
  "network" $network
  "links" $links
-}}
{{- /* Members of one release meet inside the cluster: from there, what others dial may lead nowhere. */ -}}
{{- $addresses := dict -}}
{{- range .members -}}
{{- if and .advertise (ne .id $entry.id) -}}{{- $_ := set $addresses .id (printf "%s:%d" (include "keymesh.host" (dict "root" $root "name" .name)) (int .service.port)) -}}{{- end -}}
{{- end -}}
{{- with $addresses -}}{{- $_ := set $config "addresses" . -}}{{- end -}}
{{- with include "keymesh.tracing" $root -}}{{- $_ := set $config "tracing" (fromJson .) -}}{{- end -}}
{{- if eq $entry.role "hub" -}}
{{- with $entry.policy -}}{{- $_ := set $config "policy" . -}}{{- end -}}
{{- else -}}
{{- $_ := set $config "audit_log" (printf "/var/%s/keymesh/audit.jsonl" (ternary "log" "lib" (not (empty $entry.auditVolume)))) -}}
{{- $_ := set $config "gateways" $gatewayIds -}}
{{- if eq (toString $entry.access) "open" -}}
{{- $_ := set $config "access" "open" -}}
{{- else -}}
{{- $_ := set $config "access_file" "access.yaml" -}}
{{- end -}}
{{- with $entry.border -}}
{{- $peers := list -}}
{{- range .peers -}}{{- $peers = append $peers (dict "kme_id" .kmeId "url" .url "prefixes" .prefixes) -}}{{- end -}}
{{- $_ := set $config "border" (mergeOverwrite (deepCopy (.config | default dict)) (dict "gateways" $gatewayIds "url" .url "peers" $peers)) -}}
{{- end -}}
{{- end -}}
{{- mergeOverwrite (deepCopy $entry.config) $config | toPrettyJson -}}
{{- end -}}

{{/* The tracing section, as JSON; empty where there is none. */}}
{{- define "keymesh.tracing" -}}
{{- with .Values.tracing -}}
{{- if .endpoint -}}
{{- $section := dict "endpoint" .endpoint "sample_ratio" .sampleRatio -}}
{{- if .ca -}}{{- $_ := set $section "ca" "collector-ca.pem" -}}{{- end -}}
{{- $section | toJson -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Named after the member: the proof of a mere restart is, too, and members may share a proof folder. */}}
{{- define "keymesh.dataDir" -}}
/var/lib/keymesh/{{ .root.Release.Namespace }}-{{ .entry.name }}
{{- end -}}

{{/* Arguments: root, entry, node (its collected entry). */}}
{{- define "keymesh.gatewayConfig" -}}
{{- $limits := dict "drain_delay_s" .entry.drainDelaySeconds -}}
{{- with .entry.config.limits -}}{{- $limits = mergeOverwrite (deepCopy .) $limits -}}{{- end -}}
{{- $mapping := dict "table_file" "mapping.yaml" -}}
{{- with .entry.config.sae_mapping -}}{{- $mapping = mergeOverwrite (deepCopy .) $mapping -}}{{- end -}}
{{- $config := dict
  "gateway_id" .entry.id
  "domain_id" .root.Values.domain
  "listen" (dict "https" (printf "%s:8443" .root.Values.listenHost) "http" (printf "%s:7080" .root.Values.listenHost))
  "node" (dict "kme_id" .entry.node "address" (printf "%s:%d" (include "keymesh.host" (dict "root" .root "name" .node.name)) (int .node.service.port)))
  "node_tls" (dict "ca" "/etc/keymesh/node-tls/ca.crt" "cert" "/etc/keymesh/node-tls/tls.crt" "key" "/etc/keymesh/node-tls/tls.key")
  "tls" (mergeOverwrite (deepCopy (dict "min_version" "1.2")) (.entry.config.tls | default dict | deepCopy) (dict "ca" "/etc/keymesh/sae-root/ca.crt" "cert" "/etc/keymesh/tls/tls.crt" "key" "/etc/keymesh/tls/tls.key" "deny_list" "deny.txt"))
  "audit_log" "/var/log/keymesh/audit.jsonl"
  "sae_mapping" $mapping
  "limits" $limits
-}}
{{- with include "keymesh.tracing" .root -}}{{- $_ := set $config "tracing" (fromJson .) -}}{{- end -}}
{{- if .entry.border -}}
{{- $peers := list -}}
{{- range .entry.border.peers -}}
{{- $peer := dict "kme_id" .kmeId "url" .url "ca" (printf "border-%s-ca.pem" .kmeId) -}}
{{- with .names -}}{{- $_ := set $peer "names" . -}}{{- end -}}
{{- with .fingerprints -}}{{- $_ := set $peer "fingerprints" . -}}{{- end -}}
{{- with .serverName -}}{{- $_ := set $peer "server_name" . -}}{{- end -}}
{{- $peers = append $peers $peer -}}
{{- end -}}
{{- $border := dict "listen" (printf "%s:8444" .root.Values.listenHost) "cert" "/etc/keymesh/border/tls.crt" "key" "/etc/keymesh/border/tls.key" "deny_list" "deny.txt" "peers" $peers -}}
{{- $_ := set $config "etsi020" (mergeOverwrite (deepCopy (.entry.config.etsi020 | default dict)) $border) -}}
{{- end -}}
{{- mergeOverwrite (deepCopy .entry.config) $config | toPrettyJson -}}
{{- end -}}

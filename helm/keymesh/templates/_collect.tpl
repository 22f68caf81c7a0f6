{{/*
Collects nodes, hubs and gateways with their defaults, and who is linked with whom.

Argument: a dict with "root". Sets in it "members", "nodes", "hubs" (lists of entries that have
"role", "name" and "links" besides their fields), "gateways", "byId", and "peers" (remote, by id).
*/}}
{{- define "keymesh.collect" -}}
{{- $root := .root -}}
{{- $full := include "keymesh.fullname" $root -}}
{{- $byId := dict -}}
{{- $roles := dict "node" list "hub" list -}}
{{- range $role := list "node" "hub" -}}
{{- range get $root.Values (printf "%ss" $role) -}}
{{- $entry := mergeOverwrite (deepCopy $root.Values.memberDefaults) (deepCopy .) -}}
{{- $_ := set $entry "role" $role -}}
{{- /* One source or another, never two. */ -}}
{{- $_ := set $entry "auditVolume" (.auditVolume | default $root.Values.memberDefaults.auditVolume) -}}
{{- /* A hub has no audit log. */ -}}
{{- if eq $role "hub" -}}{{- $_ := set $entry "auditVolume" dict -}}{{- $_ := set $entry "extraContainers" list -}}{{- end -}}
{{- $_ := set $entry "name" (printf "%s-%s-%s" $full $role .id) -}}
{{- $links := list -}}
{{- range .links -}}{{- $links = append $links (deepCopy .) -}}{{- end -}}
{{- $id := .id -}}
{{- range $root.Values.lab.links -}}
{{- if has $id .between -}}
{{- $peer := index (without .between $id) 0 -}}
{{- $link := dict "peer" $peer -}}
{{- with .poolMaxBytes -}}{{- $_ := set $link "poolMaxBytes" . -}}{{- end -}}
{{- if not .courier -}}
{{- $between := sortAlpha .between -}}
{{- $device := printf "%s-device-%s" $full (join "-" $between) -}}
{{- $port := ternary 8441 8442 (eq $id (first $between)) -}}
{{- $url := printf "https://%s:%d" (include "keymesh.host" (dict "root" $root "name" $device)) $port -}}
{{- $_ := set $link "device" (dict "url" $url "secret" (printf "%s-at-devices" $entry.name) "saeId" $peer "simulated" true) -}}
{{- end -}}
{{- $links = append $links $link -}}
{{- end -}}
{{- end -}}
{{- $_ := set $entry "links" $links -}}
{{- $_ := set $roles $role (append (get $roles $role) $entry) -}}
{{- $_ := set $byId .id $entry -}}
{{- end -}}
{{- end -}}
{{- $gateways := list -}}
{{- range $root.Values.gateways -}}
{{- $entry := mergeOverwrite (deepCopy $root.Values.gatewayDefaults) (deepCopy .) -}}
{{- $_ := set $entry "name" (printf "%s-gateway-%s" $full .id) -}}
{{- $_ := set $entry "border" (dig "border" dict (get $byId .node | default dict)) -}}
{{- $_ := set $entry "auditVolume" (.auditVolume | default $root.Values.gatewayDefaults.auditVolume | default (dict "emptyDir" (dict "sizeLimit" "1Gi"))) -}}
{{- $gateways = append $gateways $entry -}}
{{- end -}}
{{- $peers := dict -}}
{{- range $root.Values.network.peers -}}{{- $_ := set $peers .id . -}}{{- end -}}
{{- $_ := set . "nodes" (get $roles "node") -}}
{{- $_ := set . "hubs" (get $roles "hub") -}}
{{- $_ := set . "members" (concat (get $roles "node") (get $roles "hub")) -}}
{{- $_ := set . "gateways" $gateways -}}
{{- $_ := set . "byId" $byId -}}
{{- $_ := set . "peers" $peers -}}
{{- end -}}

{{/* Secrets of an entry: given ones, or what cert-manager fills. Arguments: entry, kind (tls, node-tls, etcd). */}}
{{- define "keymesh.secret" -}}
{{- $field := get (dict "tls" "tlsSecret" "node-tls" "nodeTlsSecret" "etcd" "etcdSecret") .kind -}}
{{- get .entry $field | default (printf "%s-%s" .entry.name .kind) -}}
{{- end -}}

{{/* The network document that a lab's values describe, as JSON. Argument: the collected context. */}}
{{- define "keymesh.document" -}}
{{- $root := .root -}}
{{- $nodes := dict -}}
{{- $links := list -}}
{{- $seen := dict -}}
{{- range .members -}}
{{- $node := dict "role" .role -}}
{{- with .site -}}{{- $_ := set $node "site" . -}}{{- end -}}
{{- with .operator -}}{{- $_ := set $node "operator" . -}}{{- end -}}
{{- if hasKey . "transit" -}}{{- $_ := set $node "transit" .transit -}}{{- end -}}
{{- $_ := set $nodes .id $node -}}
{{- $id := .id -}}
{{- range .links -}}
{{- $between := sortAlpha (list $id .peer) -}}
{{- $key := join " " $between -}}
{{- if not (hasKey $seen $key) -}}
{{- $_ := set $seen $key true -}}
{{- $link := dict "between" $between -}}
{{- with .cost -}}{{- $_ := set $link "cost" . -}}{{- end -}}
{{- $links = append $links $link -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $network := $root.Values.network -}}
{{- $grades := dict "default" (dict "grade" "trusted-relay") -}}
{{- with $network.grades.default -}}{{- $_ := set $grades "default" . -}}{{- end -}}
{{- with $network.grades.pairs -}}{{- $_ := set $grades "pairs" . -}}{{- end -}}
{{- $document := dict "format" "keymesh-network/1" "serial" (int64 $network.serial) "domain" $root.Values.domain "failure_domains" $network.failureDomains "nodes" $nodes "links" $links "saes" $network.saes "grades" $grades -}}
{{- with $network.foreign -}}{{- $_ := set $document "foreign" . -}}{{- end -}}
{{- $document | toPrettyJson -}}
{{- end -}}

{{/* Name of what a node's border has in the cluster. Arguments: root, id. */}}
{{- define "keymesh.borderName" -}}{{ printf "%s-border-%s" (include "keymesh.fullname" .root) .id }}{{- end -}}

{{/* Secret of a border's certificate. Arguments: root, id, border. */}}
{{- define "keymesh.borderSecret" -}}
{{- .border.tlsSecret | default (printf "%s-tls" (include "keymesh.borderName" .)) -}}
{{- end -}}

{{/* Port of an https URL. */}}
{{- define "keymesh.urlPort" -}}
{{- $port := regexFind ":[0-9]+$" (urlParse .).host | trimPrefix ":" -}}
{{- $port | default "443" -}}
{{- end -}}

{{/* True where the chart has a document to publish. */}}
{{- define "keymesh.hasDocument" -}}
{{- if or .Values.network.signedDocument (eq .Values.mode "lab") -}}true{{- end -}}
{{- end -}}

{{/* True where nodes take unsigned documents. */}}
{{- define "keymesh.trustsDirectory" -}}
{{- if and (eq .Values.mode "lab") (not .Values.network.operatorPublicKey) -}}true{{- end -}}
{{- end -}}

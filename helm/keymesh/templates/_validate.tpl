{{/*
What values.schema.json cannot say because it compares fields. Argument: the collected context.
*/}}
{{- define "keymesh.validate" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $isLab := eq $values.mode "lab" -}}
{{- $byId := .byId -}}
{{- $peers := .peers -}}

{{- $ids := list -}}
{{- range .members -}}
{{- if has .id $ids -}}{{- fail (printf "two nodes or hubs have the id %q: one id, one volume, one writer" .id) -}}{{- end -}}
{{- if hasKey $peers .id -}}{{- fail (printf "network.peers: %q is a member of this release" .id) -}}{{- end -}}
{{- $ids = append $ids .id -}}
{{- end -}}
{{- if not $ids -}}{{- fail "nodes, hubs: a release needs at least one of them" -}}{{- end -}}
{{- if ne (len $peers) (len $values.network.peers) -}}{{- fail "network.peers: an id is named twice" -}}{{- end -}}

{{- if not $isLab -}}
{{- if gt (len .hubs) 1 -}}{{- fail "hubs: a site runs at most one; hubs of one release share one administrator, and a DSKE pair's threshold counts administrators" -}}{{- end -}}
{{- if or $values.lab.links $values.certificates.labRoots $values.network.saes $values.network.grades.pairs -}}
{{- fail "lab.links, certificates.labRoots, network.saes and network.grades are for mode lab; a site takes them from the signed document" -}}
{{- end -}}
{{- if not $values.hubSpread.required -}}{{- fail "hubSpread.required: only a lab may put two hubs on one machine; this is a security setting" -}}{{- end -}}
{{- if not $values.network.operatorPublicKey -}}{{- fail "network.operatorPublicKey: a site needs it to check the network document" -}}{{- end -}}
{{- end -}}

{{- if and $isLab (eq $values.etcd.source "external") -}}{{- fail "etcd.source: a lab has a directory of its own; only there the document that the chart writes is published" -}}{{- end -}}
{{- if and $values.network.signedDocument (eq $values.etcd.source "external") -}}{{- fail "network.signedDocument: only the release that hosts the directory publishes it" -}}{{- end -}}

{{- range .members -}}
{{- $where := printf "%s %s" .role .id -}}
{{- $own := .id -}}
{{- /* The StatefulSet's controller appends a hash to the name and makes it a label. */ -}}
{{- if gt (len .name) 52 -}}{{- fail (printf "%s: the name %s has more than 52 characters; shorten the id or set fullnameOverride" $where .name) -}}{{- end -}}
{{- $seen := list -}}
{{- range .links -}}
{{- if eq .peer $own -}}{{- fail (printf "%s: is linked with itself" $where) -}}{{- end -}}
{{- if has .peer $seen -}}{{- fail (printf "%s: the link to %s is named twice" $where .peer) -}}{{- end -}}
{{- if not (or (hasKey $byId .peer) (hasKey $peers .peer)) -}}{{- fail (printf "%s: %s is neither in this release nor in network.peers" $where .peer) -}}{{- end -}}
{{- $seen = append $seen .peer -}}
{{- end -}}
{{- if and (eq (toString .access) "open") (not $isLab) -}}{{- fail (printf "%s: access open is for mode lab" $where) -}}{{- end -}}
{{- if and (ne .service.type "ClusterIP") (not .advertise) -}}{{- fail (printf "%s: advertise is needed with a Service of type %s: it is what peers dial" $where .service.type) -}}{{- end -}}
{{- if and (not $isLab) $values.network.peers (not .advertise) -}}{{- fail (printf "%s: advertise is needed where peers are in other clusters: it is what they dial" $where) -}}{{- end -}}
{{- if and (eq .role "hub") (dig "podAntiAffinity" false .affinity) -}}{{- fail (printf "%s: affinity.podAntiAffinity: hubSpread decides where hubs are" $where) -}}{{- end -}}
{{- include "keymesh.validateAudit" (dict "where" $where "entry" . "security" $values.security) -}}
{{- with .courier -}}
{{- if and .volume.hostPath (ne $values.security.podStandard "privileged") -}}{{- fail (printf "%s: a courier on a host path needs security.podStandard privileged" $where) -}}{{- end -}}
{{- range .imports -}}
{{- if not (has .peer $seen) -}}{{- fail (printf "%s: imports a courier file of %s, with which it has no link" $where .peer) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- with .border -}}
{{- $served := false -}}
{{- range $.gateways -}}{{- if eq .node $own -}}{{- $served = true -}}{{- end -}}{{- end -}}
{{- if not $served -}}{{- fail (printf "%s: border: no gateway of this release speaks for it" $where) -}}{{- end -}}
{{- $kmes := list -}}
{{- range .peers -}}
{{- if or (has .kmeId $kmes) (eq .kmeId $own) (hasKey $byId .kmeId) (hasKey $peers .kmeId) -}}{{- fail (printf "%s: border.peers: %s is named twice, or is of this domain" $where .kmeId) -}}{{- end -}}
{{- if not (or .names .fingerprints) -}}{{- fail (printf "%s: border.peers: pin %s by names or fingerprints of its certificate" $where .kmeId) -}}{{- end -}}
{{- $kmes = append $kmes .kmeId -}}
{{- end -}}
{{- if and (not $isLab) (eq $values.certificates.source "certManager") (not .tlsSecret) (not $values.certificates.issuers.border.name) -}}{{- fail "certificates.issuers.border.name: needed by a border" -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- range $values.lab.links -}}
{{- $device := printf "%s-device-%s" (include "keymesh.fullname" $root) (join "-" (sortAlpha .between)) -}}
{{- if and (not .courier) (gt (len $device) 63) -}}{{- fail (printf "lab.links: the name %s has more than 63 characters; shorten the ids" $device) -}}{{- end -}}
{{- range .between -}}{{- if not (hasKey $byId .) -}}{{- fail (printf "lab.links: %s is not in this release" .) -}}{{- end -}}{{- end -}}
{{- end -}}

{{- $gatewayIds := list -}}
{{- range .gateways -}}
{{- if has .id $gatewayIds -}}{{- fail (printf "two gateways have the id %q" .id) -}}{{- end -}}
{{- $gatewayIds = append $gatewayIds .id -}}
{{- if gt (len .name) 63 -}}{{- fail (printf "gateway %s: the name %s has more than 63 characters; shorten the id or set fullnameOverride" .id .name) -}}{{- end -}}
{{- include "keymesh.validateAudit" (dict "where" (printf "gateway %s" .id) "entry" . "security" $values.security) -}}
{{- $node := get $byId .node | default dict -}}
{{- if ne (get $node "role") "node" -}}{{- fail (printf "gateway %s: %s is not a node of this release; the path between them stays inside the site" .id .node) -}}{{- end -}}
{{- if gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas) -}}{{- fail (printf "gateway %s: autoscaling.minReplicas exceeds maxReplicas" .id) -}}{{- end -}}
{{- $fewest := ternary (int .autoscaling.minReplicas) (int .replicas) .autoscaling.enabled -}}
{{- if and (gt $fewest 1) (ge (int .minAvailable) $fewest) -}}{{- fail (printf "gateway %s: minAvailable %d of %d pods lets no machine be drained" .id (int .minAvailable) $fewest) -}}{{- end -}}
{{- if and (ne .service.type "ClusterIP") (not .hosts) -}}{{- fail (printf "gateway %s: hosts is needed with a Service of type %s: SAEs check the name they dial" .id .service.type) -}}{{- end -}}
{{- end -}}

{{- if not $values.certificates.labRoots -}}
{{- if and .gateways (not $values.certificates.saeRoot.secret) -}}{{- fail "certificates.saeRoot.secret: gateways need the root of the SAEs" -}}{{- end -}}
{{- if eq $values.certificates.source "certManager" -}}
{{- $issuers := list -}}
{{- range $plane := list "node" "gateway" "etcd" "border" -}}
{{- $issuer := get $values.certificates.issuers $plane -}}
{{- $isNeeded := or (eq $plane "node") (and (eq $plane "gateway") $values.gateways) (eq $plane "etcd") -}}
{{- if and $isNeeded (not $issuer.name) -}}{{- fail (printf "certificates.issuers.%s.name: needed" $plane) -}}{{- end -}}
{{- if $issuer.name -}}
{{- $key := printf "%s/%s/%s" $issuer.group $issuer.kind $issuer.name -}}
{{- if has $key $issuers -}}{{- fail (printf "certificates.issuers.%s: the issuer serves another plane already; every plane has a root of its own" $plane) -}}{{- end -}}
{{- $issuers = append $issuers $key -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range .members -}}
{{- if and .tlsSecret (eq .tlsSecret $values.certificates.saeRoot.secret) -}}{{- fail (printf "%s %s: the SAE root and a node-plane Secret are the same; the planes have two roots" .role .id) -}}{{- end -}}
{{- end -}}

{{- if and (eq $values.etcd.source "external") (not $values.etcd.external.endpoints) -}}{{- fail "etcd.external.endpoints: needed; or etcd.source bundled in the release that hosts the directory" -}}{{- end -}}
{{- if and (eq $values.etcd.source "external") $values.networkPolicy.enabled (not $values.etcd.external.cidrs) -}}{{- fail "etcd.external.cidrs: needed by the NetworkPolicies; an empty list would admit every address" -}}{{- end -}}
{{- if and (eq $values.proof.kind "hostPath") (ne $values.security.podStandard "privileged") -}}{{- fail "proof.kind hostPath needs security.podStandard privileged: the restricted standard forbids host paths" -}}{{- end -}}
{{- if and $values.tracing.endpoint $values.networkPolicy.enabled (not $values.tracing.collectors) -}}{{- fail "tracing.collectors: needed by the NetworkPolicies; an empty list would admit every address" -}}{{- end -}}
{{- if and $values.test.enabled (not (and $values.test.master.sae $values.test.slave.sae)) -}}{{- fail "test: master.sae and slave.sae are needed" -}}{{- end -}}
{{- if and $values.test.cidrs (not (or $values.test.master.url $values.test.slave.url)) -}}{{- fail "test.cidrs: without a url there is nothing outside to reach" -}}{{- end -}}

{{- if $values.network.signedDocument -}}
{{- $parts := splitn "\n\n" 2 $values.network.signedDocument -}}
{{- if not (hasPrefix "keymesh-signed-network/1\n" $values.network.signedDocument) -}}{{- fail "network.signedDocument: not what keymesh network sign writes" -}}{{- end -}}
{{- include "keymesh.validateDocument" (dict "document" (fromJson $parts._1) "members" .members "domain" $values.domain "where" "network.signedDocument") -}}
{{- else if $isLab -}}
{{- include "keymesh.validateDocument" (dict "document" (include "keymesh.document" . | fromJson) "members" .members "domain" $values.domain "where" "network") -}}
{{- end -}}
{{- end -}}

{{/* Arguments: where, entry, security. */}}
{{- define "keymesh.validateAudit" -}}
{{- if and .entry.extraContainers (not .entry.auditVolume) -}}{{- fail (printf "%s: extraContainers: without auditVolume there is nothing that they may read" .where) -}}{{- end -}}
{{- if and .entry.auditVolume.hostPath (ne .security.podStandard "privileged") -}}{{- fail (printf "%s: auditVolume on a host path needs security.podStandard privileged" .where) -}}{{- end -}}
{{- end -}}

{{/* A document against the release, and its hubs against each other. Arguments: document, members, domain, where. */}}
{{- define "keymesh.validateDocument" -}}
{{- $where := .where -}}
{{- $document := .document -}}
{{- if ne (toString $document.domain) .domain -}}{{- fail (printf "%s: is of domain %v, not %s" $where $document.domain .domain) -}}{{- end -}}
{{- $nodes := $document.nodes | default dict -}}
{{- range .members -}}
{{- if not (hasKey $nodes .id) -}}{{- fail (printf "%s: does not know %s" $where .id) -}}{{- end -}}
{{- $role := (get $nodes .id | default dict).role | default "node" -}}
{{- if ne $role .role -}}{{- fail (printf "%s: %s is a %s there, a %s here" $where .id $role .role) -}}{{- end -}}
{{- end -}}
{{- range $sae, $home := $document.saes -}}
{{- $id := $home -}}
{{- if kindIs "map" $home -}}{{- $id = $home.home -}}{{- end -}}
{{- if not (hasKey $nodes $id) -}}{{- fail (printf "%s: the home %v of SAE %s is not a node" $where $id $sae) -}}{{- end -}}
{{- end -}}
{{- $grades := $document.grades | default dict -}}
{{- range concat (list ($grades.default | default dict)) ($grades.pairs | default list) -}}
{{- $grade := .grade | default "trusted-relay" -}}
{{- $hubs := .hubs | default list -}}
{{- if hasPrefix "dske" $grade -}}
{{- $k := regexReplaceAll "^.*\\(\\s*([0-9]+)\\s*,.*$" $grade "${1}" | int -}}
{{- $n := regexReplaceAll "^.*,\\s*([0-9]+)\\s*\\)$" $grade "${1}" | int -}}
{{- if gt $k $n -}}{{- fail (printf "%s: grade %s asks for more shares than there are" $where $grade) -}}{{- end -}}
{{- if lt (len $hubs) $n -}}{{- fail (printf "%s: grade %s needs %d hubs, %d are named" $where $grade $n (len $hubs)) -}}{{- end -}}
{{- end -}}
{{- $taken := dict -}}
{{- range $hub := $hubs -}}
{{- if not (hasKey $nodes $hub) -}}{{- fail (printf "%s: the hub %s is not among the nodes" $where $hub) -}}{{- end -}}
{{- range $kind := $document.failure_domains | default (list "site" "operator") -}}
{{- $value := get (get $nodes $hub) $kind -}}
{{- if $value -}}
{{- $key := printf "%s %s" $kind $value -}}
{{- if hasKey $taken $key -}}{{- fail (printf "%s: hubs %s and %s of one pair share the %s %q: whoever runs it holds two shares. This is a security setting" $where (get $taken $key) $hub $kind $value) -}}{{- end -}}
{{- $_ := set $taken $key $hub -}}
{{- else if gt (len $hubs) 1 -}}
{{- fail (printf "%s: hub %s names no %s, so nobody can tell whether two hubs of a pair share it" $where $hub $kind) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names and labels. */}}

{{- define "keymesh.fullname" -}}
{{- $name := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name)) -}}
{{- $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{- define "keymesh.selector" -}}
app.kubernetes.io/name: keymesh
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "keymesh.labels" -}}
{{ include "keymesh.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Labels of a pod of one component: no versions, or each new chart would restart every node. Arguments as for
keymesh.component. */}}
{{- define "keymesh.podLabels" -}}
{{ include "keymesh.component" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{/* Selects one component, or one member of it. Arguments: root, component, id (optional). */}}
{{- define "keymesh.component" -}}
{{ include "keymesh.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- with .id }}
keymesh.io/id: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "keymesh.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}

{{- define "keymesh.host" -}}
{{- printf "%s.%s.svc.%s" .name .root.Release.Namespace .root.Values.clusterDomain -}}
{{- end -}}

{{/* Belongs to the whole cluster. */}}
{{- define "keymesh.priorityClass" -}}{{ .Release.Namespace }}-{{ include "keymesh.fullname" . }}{{- end -}}

{{- define "keymesh.etcdName" -}}{{ include "keymesh.fullname" . }}-etcd{{- end -}}

{{/* Names of the etcd members' pods, as a JSON list under "hosts". */}}
{{- define "keymesh.etcdHosts" -}}
{{- $name := include "keymesh.etcdName" . -}}
{{- $hosts := list -}}
{{- range until (int .Values.etcd.bundled.members) -}}
{{- $hosts = append $hosts (include "keymesh.host" (dict "root" $ "name" (printf "%s-%d.%s-peers" $name . $name))) -}}
{{- end -}}
{{- dict "hosts" $hosts | toJson -}}
{{- end -}}

{{/* host:port of every etcd member, as JSON under "endpoints". */}}
{{- define "keymesh.etcdEndpoints" -}}
{{- if eq .Values.etcd.source "external" -}}
{{- dict "endpoints" .Values.etcd.external.endpoints | toJson -}}
{{- else -}}
{{- $endpoints := list -}}
{{- range (include "keymesh.etcdHosts" . | fromJson).hosts -}}
{{- $endpoints = append $endpoints (printf "%s:2379" .) -}}
{{- end -}}
{{- dict "endpoints" $endpoints | toJson -}}
{{- end -}}
{{- end -}}

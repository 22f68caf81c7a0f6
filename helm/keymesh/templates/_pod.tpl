{{/* What all pods and containers have in common: no privilege, no token, nothing writable but volumes. */}}

{{- define "keymesh.podCommon" -}}
serviceAccountName: {{ include "keymesh.fullname" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int64 .Values.security.runAsUser }}
  runAsGroup: {{ int64 .Values.security.runAsGroup }}
  fsGroup: {{ int64 .Values.security.runAsGroup }}
  # Or every mount would open the pads' files to the group.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "keymesh.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "keymesh.priority" -}}
{{- if .Values.priority.create }}
priorityClassName: {{ include "keymesh.priorityClass" . }}
{{- else if .Values.priority.className }}
priorityClassName: {{ .Values.priority.className }}
{{- end }}
{{- end -}}

{{- define "keymesh.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Probes on the plain port: Kubernetes' own gRPC probe speaks no TLS. Argument: how often "not ready" is not believed. */}}
{{- define "keymesh.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: ops}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: ops}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: ops}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: {{ . }}
{{- end -}}

{{/* Whether pods share the audit volume of an entry: then each has a folder of its own in it. */}}
{{- define "keymesh.sharesAudit" -}}
{{- if or .auditVolume.hostPath .auditVolume.persistentVolumeClaim -}}true{{- end -}}
{{- end -}}

{{- define "keymesh.auditEnv" -}}
{{- if include "keymesh.sharesAudit" . -}}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end -}}
{{- end -}}

{{- define "keymesh.auditMount" -}}
{{- if .auditVolume -}}
- {name: audit, mountPath: /var/log/keymesh{{ if include "keymesh.sharesAudit" . }}, subPathExpr: $(POD_NAME){{ end }}}
{{- end -}}
{{- end -}}

{{/* A Secret volume, readable by the process's group only. Arguments: name, secret. */}}
{{- define "keymesh.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret | quote }}
    defaultMode: 0440
{{- end -}}

{{- define "sae-operator.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sae-operator.selectorLabels" -}}
app.kubernetes.io/name: sae-operator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "sae-operator.labels" -}}
{{ include "sae-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "sae-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "sae-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "sae-operator.jobImage" -}}
{{- default (printf "ghcr.io/sae-operator/job:%s" .Chart.AppVersion) .Values.jobImage -}}
{{- end -}}

{{- define "sae-operator.rules" -}}
# Sweeps make training jobs, and training jobs make inline caches.
- apiGroups: [sae-operator.dev]
  resources: [saetrainingjobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [sae-operator.dev]
  resources: [activationcaches]
  verbs: [get, list, watch, create, patch]
- apiGroups: [sae-operator.dev]
  resources: [saesweeps]
  verbs: [get, list, watch]
- apiGroups: [sae-operator.dev]
  resources: [activationcaches/status, saesweeps/status, saetrainingjobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list]
# Specs of steps, and the namespaces' defaults.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, patch, delete]
# Names in DNS for pods that train together.
- apiGroups: [""]
  resources: [services]
  verbs: [get, create, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
# The heartbeat comes back through a watch; it is written by the Role beside this one.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [list, watch]
{{- end -}}

{{- define "sae-operator.kinds" -}}
[activationcaches, saesweeps, saetrainingjobs]
{{- end -}}

{{- define "sae-operator.operatorPeer" -}}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ .Release.Namespace | quote }}
  podSelector:
    matchLabels:
      {{- include "sae-operator.selectorLabels" . | nindent 6 }}
{{- end -}}

{{- define "sae-operator.scrapePeer" -}}
- namespaceSelector:
    {{- if .Values.networkPolicy.scrapeFrom }}
    matchLabels:
      {{- toYaml .Values.networkPolicy.scrapeFrom | nindent 6 }}
    {{- else }} {}
    {{- end }}
{{- end -}}

{{- define "sae-operator.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sae-operator.selectorLabels" -}}
app.kubernetes.io/name: sae-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sae-operator.labels" -}}
{{ include "sae-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "sae-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "sae-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "sae-operator.rules" -}}
- apiGroups: [sae-operator.dev]
  resources: [saetrainingjobs]
  verbs: [get, list, watch]
# Inline caches are made by server-side apply.
- apiGroups: [sae-operator.dev]
  resources: [activationcaches]
  verbs: [get, list, watch, create, patch]
- apiGroups: [sae-operator.dev]
  resources: [activationcaches/status, saetrainingjobs/status]
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
  verbs: [get, create, patch]
# Names in DNS for pods that train together.
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
# The heartbeat comes back through a watch; it is written by the Role beside this one.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [list, watch]
{{- end -}}

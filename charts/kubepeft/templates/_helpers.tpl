{{/* Names, labels, images and the operator's configuration. Nothing here makes an object. */}}

{{- define "kubepeft.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "kubepeft.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "kubepeft.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "kubepeft.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "kubepeft.operator" -}}
{{ include "kubepeft.fullname" . }}-operator
{{- end }}

{{- define "kubepeft.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "kubepeft.operator" .) .Values.serviceAccount.name }}
{{- else -}}
{{ required "serviceAccount.create is false: give serviceAccount.name" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "kubepeft.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kubepeft.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "kubepeft.labels" -}}
{{ include "kubepeft.selectorLabels" . }}
app.kubernetes.io/part-of: kubepeft
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels that the operator gives to the pods of every stage (kubepeft_operator/job.py). */}}
{{- define "kubepeft.jobPodLabels" -}}
app.kubernetes.io/managed-by: kubepeft-operator
{{- end }}

{{/* An image's reference, from a dict of image and the default tag. */}}
{{- define "kubepeft.image" -}}
{{- $image := .image -}}
{{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .tag $image.tag }}{{ end }}
{{- end }}

{{/* The operator's configuration file: kubepeft_operator/config.py reads it and refuses what it does not know. */}}
{{- define "kubepeft.config" -}}
{{- if and (gt (int .Values.replicaCount) 1) (not .Values.config.leaderElection.enabled) }}
{{- fail "replicaCount above 1 needs config.leaderElection.enabled: two operators that both act would stand in each other's way" }}
{{- end }}
{{- with .Values.watchNamespaces }}
watchNamespaces: {{ toJson . }}
{{- end }}
{{ toYaml .Values.config }}
{{- $jobs := .Values.jobs }}
jobs:
  image: {{ include "kubepeft.image" (dict "image" $jobs.image "tag" .Chart.AppVersion) | quote }}
  imagePullPolicy: {{ $jobs.image.pullPolicy }}
  {{- range $key := list "imagePullSecrets" "outputUri" "serviceAccountName" "gpuResource" "runAsUser" "labels" "annotations" }}
  {{- with index $jobs $key }}
  {{ $key }}: {{ toJson . }}
  {{- end }}
  {{- end }}
  {{- $env := list }}
  {{- with $jobs.s3.endpoint }}{{ $env = append $env (dict "name" "AWS_ENDPOINT_URL" "value" .) }}{{ end }}
  {{- with $jobs.s3.region }}{{ $env = append $env (dict "name" "AWS_REGION" "value" .) }}{{ end }}
  {{- with concat $env $jobs.env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $jobs.caBundle.configMap }}
  caBundle: {{ toJson $jobs.caBundle }}
  {{- end }}
  {{- range $stage := list "prepare" "train" "infer" }}
  {{ $stage }}:
    {{- range $key, $value := index $jobs $stage }}
    {{- if $value }}
    {{ $key }}: {{ toJson $value }}
    {{- end }}
    {{- end }}
  {{- end }}
{{- end }}

{{/* The namespaces in which job pods run, where they are known: a JSON list. */}}
{{- define "kubepeft.jobNamespaces" -}}
{{ concat .Values.watchNamespaces .Values.networkPolicy.jobs.namespaces | uniq | toJson }}
{{- end }}

{{/* What the restricted Pod Security Standard asks for, and a little more. */}}
{{- define "kubepeft.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kubepeft.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

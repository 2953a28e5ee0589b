{{- define "cb.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough for "-servers" and "-router" behind it. */}}
{{- define "cb.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "cb.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "cb.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Takes (list root component). */}}
{{- define "cb.selector" -}}
app.kubernetes.io/name: {{ include "cb.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "cb.labels" -}}
{{ include "cb.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end -}}

{{/* Takes (dict "image" values "default" tag). */}}
{{- define "cb.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .default }}
{{- end -}}
{{- end -}}

{{/* Helm reads large integers as floats and would print 4.194304e+06. */}}
{{- define "cb.number" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{/* A flag of serve from its name in camel case and its value; names that end in "S" are seconds. */}}
{{- define "cb.flag" -}}
{{- $name := index . 0 | kebabcase -}}
{{- $value := index . 1 -}}
{{- if kindIs "bool" $value -}}
--{{ ternary "" "no-" $value }}{{ $name }}
{{- else -}}
--{{ $name }}={{ include "cb.number" $value }}
{{- end -}}
{{- end -}}

{{- define "cb.modelDir" -}}
/models/{{ base .Values.model.name }}
{{- end -}}

{{/* What serve takes as --model: a directory, or a name that it knows. */}}
{{- define "cb.model" -}}
{{- if has .Values.model.source (list "claim" "image") }}{{ include "cb.modelDir" . }}{{ else }}{{ .Values.model.name }}{{ end -}}
{{- end -}}

{{/* Bytes of a quantity such as 512Mi. */}}
{{- define "cb.bytes" -}}
{{- $text := include "cb.number" . -}}
{{- $units := dict "k" 1000 "Ki" 1024 "M" 1000000 "Mi" 1048576 "G" 1000000000 "Gi" 1073741824 "T" 1000000000000 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- mulf (regexFind "^[0-9.]+" $text | float64) (ternary (get $units $unit) 1 (hasKey $units $unit)) | int64 -}}
{{- end -}}

{{- define "cb.servedName" -}}
{{- .Values.model.servedName | default .Values.model.name -}}
{{- end -}}

{{/* Seconds that serve has from SIGTERM to its end; the defaults are those of serve. */}}
{{- define "cb.drainS" -}}
{{- $s := .Values.settings -}}
{{- $delay := ternary $s.drainDelayS 0 (hasKey $s "drainDelayS") -}}
{{- $shutdown := ternary $s.shutdownTimeoutS 25 (hasKey $s "shutdownTimeoutS") -}}
{{- addf $delay $shutdown | ceil | int64 -}}
{{- end -}}

{{/* 10 more: for the audit log to be written, and for the kubelet to look. */}}
{{- define "cb.graceS" -}}
{{- add (include "cb.drainS" . | int64) 10 -}}
{{- end -}}

{{- define "cb.requestTimeoutS" -}}
{{- $s := .Values.settings -}}
{{- ternary $s.requestTimeoutS 1800 (hasKey $s "requestTimeoutS") | ceil | int64 -}}
{{- end -}}

{{- define "cb.maxBodyBytes" -}}
{{- $s := .Values.settings -}}
{{- ternary $s.maxBodyBytes 4194304 (hasKey $s "maxBodyBytes") | int64 -}}
{{- end -}}

{{/* Name of a Secret: the user's, else the chart's own; takes (list root values suffix). */}}
{{- define "cb.secret" -}}
{{- (index . 1).existingSecret | default (printf "%s-%s" (include "cb.fullname" (index . 0)) (index . 2)) -}}
{{- end -}}

{{- define "cb.hasPolicies" -}}
{{- if or .Values.policies.inline .Values.policies.existingSecret }}yes{{ end -}}
{{- end -}}

{{- define "cb.hasPepper" -}}
{{- if or .Values.pepper.value .Values.pepper.existingSecret }}yes{{ end -}}
{{- end -}}

{{/* What a Secret holds is not known here; keys want a pepper, so with one it has them. */}}
{{- define "cb.hasInlineKeys" -}}
{{- if regexMatch "(?m)^\\s*(\\[\\[\\s*keys\\s*\\]\\]|keys\\s*=)" .Values.policies.inline }}yes{{ end -}}
{{- end -}}

{{- define "cb.hasKeys" -}}
{{- if and (include "cb.hasPepper" .) (or .Values.policies.existingSecret (include "cb.hasInlineKeys" .)) }}yes{{ end -}}
{{- end -}}

{{- define "cb.hasSigningKey" -}}
{{- if or .Values.audit.signingKey.value .Values.audit.signingKey.existingSecret }}yes{{ end -}}
{{- end -}}

{{- define "cb.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ include "cb.number" .Values.runAsUser }}
runAsGroup: {{ include "cb.number" .Values.runAsUser }}
fsGroup: {{ include "cb.number" .Values.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "cb.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Takes (list root component). */}}
{{- define "cb.spread" -}}
{{- $selector := include "cb.selector" . -}}
{{- range (index . 0).Values.topologySpread }}
- topologyKey: {{ . }}
  maxSkew: 1
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- $selector | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Labels of the series of this release's servers, as Prometheus's operator gives them. */}}
{{- define "cb.series" -}}
namespace="{{ .Release.Namespace }}",service="{{ include "cb.fullname" . }}-servers"
{{- end -}}

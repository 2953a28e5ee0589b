{{/* Volumes of a server pod. */}}
{{- define "cb.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.shmSize }}
- name: cache
{{- if .Values.cache.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.cache.existingClaim }}
{{- else }}
  emptyDir:
    sizeLimit: {{ .Values.cache.sizeLimit }}
{{- end }}
{{- if eq .Values.model.source "claim" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .Values.model.claim.name }}
    readOnly: true
{{- else if eq .Values.model.source "image" }}
- name: model
  emptyDir: {}
{{- end }}
{{- if eq .Values.breaker.source "claim" }}
- name: breaker
  persistentVolumeClaim:
    claimName: {{ .Values.breaker.claim.name }}
    readOnly: true
{{- else if eq .Values.breaker.source "image" }}
- name: breaker
  emptyDir: {}
{{- end }}
{{- if include "cb.hasPolicies" . }}
- name: policies
  secret:
    secretName: {{ include "cb.secret" (list . .Values.policies "policies") }}
    defaultMode: 0440
    items:
      - key: {{ .Values.policies.key }}
        path: policies.toml
{{- end }}
{{- if include "cb.hasPepper" . }}
- name: pepper
  secret:
    secretName: {{ include "cb.secret" (list . .Values.pepper "pepper") }}
    defaultMode: 0440
    items:
      - key: {{ .Values.pepper.key }}
        path: pepper
{{- end }}
{{- if include "cb.hasSigningKey" . }}
- name: audit-key
  secret:
    secretName: {{ include "cb.secret" (list . .Values.audit.signingKey "audit-key") }}
    defaultMode: 0440
    items:
      - key: {{ .Values.audit.signingKey.key }}
        path: key
{{- end }}
{{- if eq .Values.audit.store "sqlite" }}
- name: audit
  persistentVolumeClaim:
    claimName: {{ .Values.audit.sqlite.existingClaim | default (printf "%s-audit" (include "cb.fullname" .)) }}
{{- else if eq .Values.audit.store "postgresql" }}
- name: audit
{{- if .Values.audit.spool.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.audit.spool.existingClaim }}
{{- else }}
  emptyDir:
    sizeLimit: 1Gi
{{- end }}
{{- end }}
{{- end -}}

{{/* Where model and breaker are, for whoever reads them. */}}
{{- define "cb.modelMount" -}}
{{- if eq .Values.model.source "claim" }}
- name: model
  mountPath: {{ include "cb.modelDir" . }}
  readOnly: true
  {{- with .Values.model.claim.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- else if eq .Values.model.source "image" }}
- name: model
  mountPath: {{ include "cb.modelDir" . }}
  readOnly: true
{{- end }}
{{- end -}}

{{- define "cb.breakerMount" -}}
{{- if ne .Values.breaker.source "builtin" }}
- name: breaker
  mountPath: /breaker
  readOnly: true
  {{- if and (eq .Values.breaker.source "claim") .Values.breaker.claim.subPath }}
  subPath: {{ .Values.breaker.claim.subPath }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The root is read-only: everything that writes is told where. */}}
{{- define "cb.env" -}}
- name: HOME
  value: /cache/home
- name: USER
  value: circuit-breakers
- name: TMPDIR
  value: /tmp
- name: CIRCUIT_BREAKERS_CACHE
  value: /cache/circuit-breakers
- name: HF_HOME
  value: /cache/huggingface
- name: XDG_CACHE_HOME
  value: /cache/xdg
- name: VLLM_CACHE_ROOT
  value: /cache/vllm
- name: VLLM_CONFIG_ROOT
  value: /cache/vllm-config
- name: TORCHINDUCTOR_CACHE_DIR
  value: /cache/inductor
- name: TRITON_CACHE_DIR
  value: /cache/triton
- name: VLLM_NO_USAGE_STATS
  value: "1"
{{- end -}}

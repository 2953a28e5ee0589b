{{/* What the schema cannot say: settings that do not go together. Each says the cure. */}}
{{- define "cb.checks" -}}
{{- $v := .Values -}}
{{- $scales := ne $v.autoscaling.kind "none" -}}
{{- if and (eq $v.audit.store "sqlite") (or $scales (gt (int $v.replicas) 1)) -}}
{{- fail (printf "got audit.store sqlite with %s, expected one server: SQLite has one writer; set audit.store to postgresql and give audit.url" (ternary "autoscaling" (printf "replicas %d" (int $v.replicas)) $scales)) -}}
{{- end -}}
{{- if and (eq $v.audit.store "postgresql") (not (or $v.audit.url.value $v.audit.url.existingSecret)) -}}
{{- fail "got audit.store postgresql without a URL, expected one; set audit.url.existingSecret to a Secret that holds it" -}}
{{- end -}}
{{- if and (ne $v.audit.store "postgresql") (or $v.audit.url.value $v.audit.url.existingSecret) -}}
{{- fail (printf "got audit.url with audit.store %s, expected postgresql; set audit.store" $v.audit.store) -}}
{{- end -}}
{{- if and (eq $v.audit.store "none") (or (include "cb.hasSigningKey" .) $v.settings.scoreTraces) -}}
{{- fail "got audit.signingKey or settings.scoreTraces with audit.store none, expected an audit log to go with it; set audit.store" -}}
{{- end -}}
{{- if and (eq $v.audit.store "postgresql") $v.networkPolicy.enabled (not $v.networkPolicy.egress) -}}
{{- fail "got audit.store postgresql with networkPolicy.egress empty, expected a rule that lets the servers reach it; name its address there" -}}
{{- end -}}
{{- if and $v.policies.inline $v.policies.existingSecret -}}
{{- fail "got policies.inline and policies.existingSecret, expected one of them; leave one out" -}}
{{- end -}}
{{- if and (include "cb.hasPepper" .) (not (include "cb.hasPolicies" .)) -}}
{{- fail "got a pepper without policies, expected the policy file with the keys, or anybody may use the server; set policies.existingSecret" -}}
{{- end -}}
{{- if and (include "cb.hasInlineKeys" .) (not (include "cb.hasPepper" .)) -}}
{{- fail "got API keys in policies.inline without a pepper, expected the one that they were hashed with; set pepper.existingSecret" -}}
{{- end -}}
{{- if and $v.settings.otlpEndpoint $v.networkPolicy.enabled (not $v.networkPolicy.egress) -}}
{{- fail "got settings.otlpEndpoint with networkPolicy.egress empty, expected a rule that lets the spans out; name the collector's address there" -}}
{{- end -}}
{{- $closed := and $v.networkPolicy.enabled (or $v.networkPolicy.from $v.router.enabled) -}}
{{- if and $v.monitoring.serviceMonitor.enabled $closed (not $v.networkPolicy.metricsFrom) -}}
{{- fail "got monitoring.serviceMonitor.enabled with servers that the network policy closes, expected a way in for the scrapes; name your Prometheus in networkPolicy.metricsFrom" -}}
{{- end -}}
{{- $memory := dig "limits" "memory" "" $v.router.resources -}}
{{- if and $v.router.enabled $memory -}}
{{- $bodies := mul (int64 $v.router.maxRequestsPerAddress) (include "cb.maxBodyBytes" . | int64) -}}
{{- if gt (mul 2 $bodies) (include "cb.bytes" $memory | int64) -}}
{{- fail (printf "got router.maxRequestsPerAddress %d with bodies of %s bytes, expected no more than half of the memory %v; lower it, or raise router.resources.limits.memory" (int64 $v.router.maxRequestsPerAddress) (include "cb.maxBodyBytes" .) $memory) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.autoscaling.kind "keda") (not $v.monitoring.serviceMonitor.enabled) -}}
{{- fail "got autoscaling.kind keda without a ServiceMonitor, expected the series that it asks Prometheus for; set monitoring.serviceMonitor.enabled" -}}
{{- end -}}
{{- if and (eq $v.model.source "claim") (not $v.model.claim.name) -}}
{{- fail "got model.source claim without model.claim.name, expected a PersistentVolumeClaim; name it" -}}
{{- end -}}
{{- if and (eq $v.model.source "image") (not $v.model.image.reference) -}}
{{- fail "got model.source image without model.image.reference, expected an OCI image; name it" -}}
{{- end -}}
{{- if and (eq $v.model.source "hub") $v.networkPolicy.enabled (not $v.networkPolicy.egress) -}}
{{- fail "got model.source hub with networkPolicy.egress empty, expected a rule that lets the download out; allow port 443 there, or mount the weights with model.source claim" -}}
{{- end -}}
{{- if and (ne $v.model.source "hub") (or $v.model.hub.revision $v.model.hub.tokenSecret) -}}
{{- fail (printf "got model.hub with model.source %s, expected hub; set model.source" $v.model.source) -}}
{{- end -}}
{{- if and (eq $v.breaker.source "builtin") (ne $v.model.source "builtin") -}}
{{- fail (printf "got breaker.source builtin with model.source %s, expected a breaker of your own: one ships for built-in models only; set breaker.source to claim or image" $v.model.source) -}}
{{- end -}}
{{- if and (eq $v.breaker.source "claim") (not $v.breaker.claim.name) -}}
{{- fail "got breaker.source claim without breaker.claim.name, expected a PersistentVolumeClaim; name it" -}}
{{- end -}}
{{- if and (eq $v.breaker.source "image") (not $v.breaker.image.reference) -}}
{{- fail "got breaker.source image without breaker.image.reference, expected an OCI image; name it" -}}
{{- end -}}
{{- if and $v.loras (ne $v.model.source "claim") -}}
{{- fail (printf "got loras with model.source %s, expected claim: they are folders of that volume" $v.model.source) -}}
{{- end -}}
{{- $ranks := mul ($v.settings.tensorParallelSize | default 1) ($v.settings.pipelineParallelSize | default 1) ($v.settings.dataParallelSize | default 1) -}}
{{- if and (gt (int $v.gpu.count) 0) (ne (int $v.gpu.count) (int $ranks)) -}}
{{- fail (printf "got gpu.count %d with %d ranks, expected as many; set settings.tensorParallelSize, or gpu.count" (int $v.gpu.count) (int $ranks)) -}}
{{- end -}}
{{- if and $scales (lt (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas)) -}}
{{- fail (printf "got autoscaling.maxReplicas %d below minReplicas %d, expected at least that; raise it" (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas)) -}}
{{- end -}}
{{- if and (eq (int $v.strategy.maxSurge) 0) (eq (int $v.strategy.maxUnavailable) 0) -}}
{{- fail "got strategy.maxSurge 0 and maxUnavailable 0, expected one above 0, or no pod could ever be replaced; raise one" -}}
{{- end -}}
{{- end -}}

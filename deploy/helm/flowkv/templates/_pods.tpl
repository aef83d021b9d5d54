{{/* What all pods have in common. Takes the root. */}}
{{- define "flowkv.pod" -}}
automountServiceAccountToken: false
# A Service named flowkv would add variables FLOWKV_..., which services refuse: theirs are settings.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Where pods of a component may run. Takes (dict "root" $ "component" NAME "values" VALUES). */}}
{{- define "flowkv.placement" -}}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "flowkv.selector" . | nindent 14 }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "flowkv.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Settings as variables. A setting of null is left out. */}}
{{- define "flowkv.settings" -}}
{{- range $name, $value := . }}
{{- if not (kindIs "invalid" $value) }}
- name: FLOWKV_{{ upper $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* What all services are told, as JSON. Takes the root. */}}
{{- define "flowkv.commonSettings" -}}
{{- $settings := dict "host" "0.0.0.0" "nats_url_file" "/keys/nats_url" "nats_replicas" .Values.bus.replicas "nats_storage" .Values.bus.storage "namespace" .Values.bus.namespace }}
{{- if .Values.tls.enabled }}
{{- $settings = merge $settings (dict "nats_ca" "/tls/ca.crt" "nats_cert" "/tls/tls.crt" "nats_key" "/tls/tls.key") }}
{{- end }}
{{- toJson $settings }}
{{- end }}

{{/* Where a service has what shows NATS who it is. Takes the root. */}}
{{- define "flowkv.keysMounts" -}}
- {name: keys, mountPath: /keys, readOnly: true}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- end }}

{{/* The password and the certificate of one user of NATS. Takes (dict "root" $ "user" NAME). */}}
{{- define "flowkv.keysVolumes" -}}
- name: keys
  secret:
    secretName: {{ .root.Release.Name }}-nats-{{ .user }}
    defaultMode: 0440
    items: [{key: nats_url, path: nats_url}]
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ .root.Release.Name }}-tls-{{ .user }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "flowkv.modelsVolume" -}}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.modelVolume.existingClaim | default (printf "%s-models" .Release.Name) }}
{{- end }}

{{/* Waits until the job has fetched a model. Takes (dict "root" $ "model" MODEL). */}}
{{- define "flowkv.awaitModel" -}}
- name: await-{{ .model.name }}
  image: {{ include "flowkv.image" (dict "root" .root "image" "control") }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command: [timeout, {{ .root.Values.modelJob.timeoutSeconds | quote }}, sh, -c]
  args: ['until [ -e "$0" ]; do sleep 1; done', {{ include "flowkv.modelPath" .model }}]
  {{- include "flowkv.containerSecurity" . | nindent 2 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {cpu: 100m, memory: 64Mi}
  volumeMounts:
    - {name: models, mountPath: /models, readOnly: true}
{{- end }}

{{/* Takes (dict "ports" NUMBERS "scheme" "HTTP" "startSeconds" SECONDS): of a range the container knows its port. */}}
{{- define "flowkv.probes" -}}
startupProbe:
  {{- include "flowkv.probe" (merge (dict "path" "/health/live") .) | nindent 2 }}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: {{ div .startSeconds 2 }}
livenessProbe:
  {{- include "flowkv.probe" (merge (dict "path" "/health/live") .) | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  {{- include "flowkv.probe" (merge (dict "path" "/health/ready") .) | nindent 2 }}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}

{{- define "flowkv.probe" -}}
{{- if contains "-" (toString .ports) -}}
exec: {command: [python, -m, flowkv_common.health, {{ .ports | quote }}, {{ .path }}]}
{{- else -}}
httpGet: {path: {{ .path }}, port: http, scheme: {{ .scheme }}}
{{- end }}
{{- end }}

{{/* Drains of a host take one pod of a component at a time. Takes (dict "root" $ "component" NAME). */}}
{{- define "flowkv.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .root.Release.Name }}-{{ .component }}
  labels:
    {{- include "flowkv.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      {{- include "flowkv.selector" . | nindent 6 }}
{{- end }}

# Two images. control: gateway and scheduler, without torch. engine: prefill, decode and the model's fetching.
#   docker build --target control .
#   docker build --target engine [--build-arg TORCH_INDEX=URL] [--build-arg EXTRAS="engine otel gpu"] .
# TORCH_INDEX is a further package index to take torch from: PyTorch's index of CPU builds keeps CUDA, several GB,
# out of the image. EXTRAS="engine otel gpu" adds what KV transfers between GPUs need (gpu12, with a torch for CUDA 12).
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py ./

# --- what comes from elsewhere: layers that a change of our code leaves alone -------------------------
FROM build AS control-libs
RUN python3 -m venv --without-pip /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py otel >requirements.txt && \
    pip --python /opt/venv install -c constraints.txt -r requirements.txt

FROM build AS engine-libs
ARG TORCH_INDEX=
ARG EXTRAS="engine otel"
# With pip: the default model comes as a package.
RUN python3 -m venv /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} -c constraints.txt torch
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py ${EXTRAS} >requirements.txt && \
    /opt/venv/bin/pip install -c constraints.txt -r requirements.txt

# --- FlowKV itself --------------------------------------------------------------------------------------
FROM build AS code
COPY README.md LICENSE ./
COPY libs libs
COPY services services
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --target /opt/flowkv .

# --- the images -----------------------------------------------------------------------------------------
FROM ${PYTHON} AS base
# A named volume takes the owner of the folder that it is first mounted on.
RUN groupadd --gid 10001 flowkv && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp flowkv && \
    install -d -o 10001 -g 10001 -m 0700 /models /kernels /sockets /keys && \
    install -d -o 10001 -g 10001 -m 0700 /keys/nats /keys/gateway /keys/scheduler /keys/node /keys/operator
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/flowkv PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp XDG_CACHE_HOME=/tmp
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.description="LLM serving with prefill and decode on separate nodes" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${REVISION}

FROM base AS control
LABEL org.opencontainers.image.title=flowkv-control
COPY --from=control-libs /opt/venv /opt/venv
COPY --from=code /opt/flowkv /opt/flowkv
CMD ["flowkv_gateway"]

FROM base AS engine
LABEL org.opencontainers.image.title=flowkv-engine
# On a GPU Triton compiles a launcher in C for each of its kernels.
ARG EXTRAS="engine otel"
USER root
RUN case " ${EXTRAS} " in *" gpu"*) \
    apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* ;; \
    esac
USER 10001:10001
ENV HF_HUB_DISABLE_TELEMETRY=1 NUMBA_CACHE_DIR=/kernels
COPY --from=engine-libs /opt/venv /opt/venv
COPY --from=code /opt/flowkv /opt/flowkv
CMD ["flowkv_decode"]

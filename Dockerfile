# The four images of Sightline, one target each. From the repository's root:
#
#   docker build --target gateway -t sightline-gateway .               the pipeline's front and the batch worker; no torch
#   docker build --target operator -t sightline-operator .             no torch either
#   docker build --target predictor-cpu -t sightline-predictor .       any of the five models, and the small checkpoints
#   docker build --target predictor-cuda -t sightline-predictor-cuda . with vLLM and bitsandbytes (x86-64)
#
#   docker run -e API_KEY=… -p 127.0.0.1:8000:8000 -v ./images:/app/images:ro sightline-predictor blip --port 8000
#
# The words behind a predictor's or the gateway's image are those of `sightline serve`. Locks have hashes and no index
# lines: where packages come from is the builder's configuration (PIP_INDEX_URL, …). Dependencies are one layer and the
# code another, so that a change of code is a small push.
ARG BASE_IMAGE=python:3.12-slim
ARG VERSION=0.1.0

# --- what is installed -----------------------------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/python && python3 -m venv /opt/tools
COPY requirements/image.txt requirements/
RUN /opt/tools/bin/pip install --require-hashes -r requirements/image.txt
COPY --chmod=755 predictors/docker/strip /opt/tools/bin/

# Each: what it needs, a list of that (CycloneDX), and then nothing that could install more.
FROM build AS gateway-packages
COPY requirements/gateway.txt requirements/
RUN /opt/python/bin/pip install --require-hashes -r requirements/gateway.txt \
 && /opt/tools/bin/cyclonedx-py environment -o /opt/python/sbom.cdx.json /opt/python \
 && /opt/tools/bin/strip

FROM build AS operator-packages
COPY requirements/operator.txt requirements/
RUN /opt/python/bin/pip install --require-hashes -r requirements/operator.txt \
 && /opt/tools/bin/cyclonedx-py environment -o /opt/python/sbom.cdx.json /opt/python \
 && /opt/tools/bin/strip

FROM build AS cpu-packages
COPY requirements/serve.txt requirements/
RUN /opt/python/bin/pip install --require-hashes -r requirements/serve.txt \
 && /opt/tools/bin/cyclonedx-py environment -o /opt/python/sbom.cdx.json /opt/python \
 && /opt/tools/bin/strip

FROM build AS cuda-packages
COPY requirements/vllm.txt requirements/
RUN /opt/python/bin/pip install --require-hashes -r requirements/vllm.txt \
 && /opt/tools/bin/cyclonedx-py environment -o /opt/python/sbom.cdx.json /opt/python \
 && /opt/tools/bin/strip

FROM build AS code
COPY LICENSE ./
COPY predictors predictors
COPY operator operator
RUN for part in predictors operator; do \
      /opt/tools/bin/pip install --no-deps --no-build-isolation --target /opt/code/$part ./$part || exit 1; \
    done \
 && sed -i '1s|.*|#!/opt/python/bin/python|' /opt/code/*/bin/* \
 && cp -r /opt/code/predictors /opt/code/gateway && find /opt/code/gateway -name '*.safetensors' -delete

# --- the images ------------------------------------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS base
ARG VERSION
LABEL org.opencontainers.image.title="Sightline" \
      org.opencontainers.image.description="Vision-language models, served on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# Folders that volumes are mounted on belong to the user before they are: a new named volume takes that over.
RUN groupadd --gid 1000 sightline && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /var/lib/sightline sightline \
 && mkdir -p /var/lib/sightline /var/cache/huggingface /app/images \
 && chown sightline:sightline /var/lib/sightline /var/cache/huggingface
ENV PATH=/opt/code/bin:/opt/python/bin:$PATH \
    PYTHONPATH=/opt/code \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /var/lib/sightline

FROM base AS operator
COPY --from=operator-packages /opt/python /opt/python
COPY --from=code /opt/code/operator /opt/code
EXPOSE 9090
# Of the process that leads or waits to lead; the chart asks the same.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1m --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9090/healthz', timeout=4)"]
ENTRYPOINT ["python", "-m", "sightline_operator"]
CMD ["run"]

# Threads that spin while they wait make two shared cores ten times slower; how many there are comes from the CPU quota.
FROM base AS serving
ENV HF_HOME=/var/cache/huggingface \
    XDG_STATE_HOME=/var/lib/sightline \
    IMAGE_ROOT=/app/images \
    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 TOKENIZERS_PARALLELISM=false \
    PORT=8080
EXPOSE 8080
COPY --chmod=755 predictors/docker/ready /usr/local/bin/ready
# Ready, not merely alive: the weights are there.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["ready"]
ENTRYPOINT ["sightline", "serve"]

FROM serving AS gateway
COPY --from=gateway-packages /opt/python /opt/python
COPY --from=code /opt/code/gateway /opt/code
CMD ["pipeline"]

FROM serving AS predictor-cuda
COPY --from=cuda-packages /opt/python /opt/python
COPY --from=code /opt/code/predictors /opt/code
CMD ["all"]

FROM serving AS predictor-cpu
COPY --from=cpu-packages /opt/python /opt/python
COPY --from=code /opt/code/predictors /opt/code
CMD ["all"]

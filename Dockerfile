FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/odma
WORKDIR /src
COPY . .
RUN /opt/odma/bin/pip install --no-cache-dir . \
    && /opt/odma/bin/pip uninstall --yes setuptools pip

FROM python:3.11-slim
COPY --from=build /opt/odma /opt/odma
RUN useradd --uid 1000 --no-create-home odma \
    && install --directory --owner odma --group odma --mode 700 /var/lib/odma
USER odma
ENV PATH=/opt/odma/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ODMA_LISTEN=0.0.0.0:50051,unix:/var/lib/odma/odma.sock \
    ODMA_POOL_DIR=/var/lib/odma
EXPOSE 50051 9464
HEALTHCHECK --interval=15s --timeout=10s --start-period=10s \
    CMD ["odma", "health", "--target", "unix:/var/lib/odma/odma.sock"]
ENTRYPOINT ["odma"]
CMD ["serve"]

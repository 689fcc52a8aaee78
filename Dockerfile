# The service, its checker, and the two images of the lab that lack a program to check their own health with.
#
#   docker build -t writethrough .                          the service
#   docker build -t check     --target check .              the checker, which needs nothing but the service's URL
#   docker build -t collector --target otel-collector .     a collector with the probe
#   docker build -t jaeger    --target jaeger .             Jaeger with the probe

ARG RUST_IMAGE=rust:1.95-alpine
ARG COLLECTOR_IMAGE=otel/opentelemetry-collector-contrib:0.160.0
ARG JAEGER_IMAGE=jaegertracing/jaeger:2.21.0

# On musl the program is linked statically, so it runs in an image without anything else. It serves and asks for its
# health; the lab and the checker are left out.
FROM ${RUST_IMAGE} AS build
RUN apk add --no-cache build-base
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/source/target \
    cargo build --locked --release --package writethrough-cli --no-default-features \
    && cp target/release/writethrough /writethrough

FROM build AS build-check
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/source/target \
    cargo build --locked --release --package writethrough-cli --no-default-features --features check \
    && cp target/release/writethrough /writethrough

FROM scratch AS check
COPY --from=build-check /writethrough /writethrough
USER 65532:65532
ENTRYPOINT ["/writethrough", "check"]

FROM ${COLLECTOR_IMAGE} AS otel-collector
COPY --from=build /writethrough /writethrough

FROM ${JAEGER_IMAGE} AS jaeger
COPY --from=build /writethrough /writethrough

# The last stage is the default one. No shell, no package, one file and the list of certificate
# authorities, which `rediss://` and `sslmode=verify-full` need.
FROM scratch AS api
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /writethrough /writethrough
# All addresses, of IPv6 and IPv4. Platforms that choose the port set this variable.
ENV PORT=8000
EXPOSE 8000
USER 65532:65532
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s --retries=3 CMD ["/writethrough", "health"]
ENTRYPOINT ["/writethrough"]
CMD ["serve"]

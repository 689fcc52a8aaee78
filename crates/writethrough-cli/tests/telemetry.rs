//! Traces as others set them up: `OTEL_*` variables in, spans at a receiver out, and nothing lost in
//! silence.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use reqwest::Method;
use rustls::pki_types::PrivateKeyDer;
use support::{ApiClient, SAMPLE, until};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use writethrough_lab::cluster::{Node as ApiNode, Serve};
use writethrough_testbed::{Testbed, free_port};

const PROGRAM: &str = env!("CARGO_BIN_EXE_writethrough");
const PATIENCE: Duration = Duration::from_secs(20);
const SERVER: i32 = 2;
const GRPC_PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// One request that a receiver got.
struct Received {
    path: String,
    headers: HeaderMap,
    traces: ExportTraceServiceRequest,
}

type Frames = futures::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>;
type Answer = Response<StreamBody<Frames>>;

/// A receiver of OTLP, over HTTP/1 or gRPC.
#[derive(Clone)]
struct Receiver {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    answer: Arc<Mutex<ExportTraceServiceResponse>>,
}

impl Receiver {
    async fn listen(grpc: bool, port: u16, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let receiver = Self {
            address: listener.local_addr().unwrap(),
            received: Arc::default(),
            answer: Arc::default(),
        };
        let this = receiver.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (this, tls) = (this.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        // A client that does not trust this receiver ends here.
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                this.serve(grpc, stream).await;
                            }
                        }
                        None => this.serve(grpc, stream).await,
                    }
                });
            }
        });
        receiver
    }

    async fn http() -> Self {
        Self::listen(false, 0, None).await
    }

    async fn serve(self, grpc: bool, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(move |request| self.clone().take(grpc, request));
        let io = TokioIo::new(stream);
        // A client that goes away is no failure here.
        let _ = if grpc {
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            http.serve_connection(io, service).await
        } else {
            let http = hyper::server::conn::http1::Builder::new();
            http.serve_connection(io, service).await
        };
    }

    async fn take(self, grpc: bool, request: Request<Incoming>) -> Result<Answer, Infallible> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let (packed, body) = if grpc {
            // A message follows a byte that says whether it is packed, and its length.
            (body[0] == 1, body.slice(5..))
        } else {
            let packed = head.headers.get("content-encoding");
            (packed.is_some_and(|coding| coding == "gzip"), body)
        };
        let mut plain = Vec::new();
        if packed {
            let mut decoder = flate2::read::GzDecoder::new(&body[..]);
            decoder.read_to_end(&mut plain).unwrap();
        } else {
            plain.extend_from_slice(&body);
        }
        self.received.lock().unwrap().push(Received {
            path: head.uri.path().to_owned(),
            headers: head.headers,
            traces: ExportTraceServiceRequest::decode(&plain[..]).unwrap(),
        });
        let answer = self.answer.lock().unwrap().encode_to_vec();
        let mut frames = Vec::new();
        if grpc {
            let mut message = vec![0];
            message.extend_from_slice(&u32::try_from(answer.len()).unwrap().to_be_bytes());
            message.extend(answer);
            let ok = HeaderValue::from_static("0");
            let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), ok)]);
            frames.push(Ok(Frame::data(Bytes::from(message))));
            frames.push(Ok(Frame::trailers(trailers)));
        } else {
            frames.push(Ok(Frame::data(Bytes::from(answer))));
        }
        let kind = if grpc {
            "application/grpc"
        } else {
            "application/x-protobuf"
        };
        let response = Response::builder().header("content-type", kind);
        Ok(response
            .body(StreamBody::new(futures::stream::iter(frames)))
            .unwrap())
    }

    fn spans(&self) -> Vec<Span> {
        let received = self.received.lock().unwrap();
        let resources = received.iter().flat_map(|one| &one.traces.resource_spans);
        let scopes = resources.flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// The server spans of requests for items, when there are this many.
    async fn server_spans(&self, at_least: usize) -> Vec<Span> {
        until("spans have arrived", async || {
            let spans: Vec<Span> = self
                .spans()
                .into_iter()
                .filter(|span| span.kind == SERVER)
                .collect();
            (spans.len() >= at_least).then_some(spans)
        })
        .await
    }
}

/// A node with a database in memory.
struct Node {
    node: ApiNode,
    api: ApiClient,
}

impl Node {
    async fn start(testbed: &Testbed, variables: &[(&str, &str)]) -> Self {
        let mut serve = Serve::new("api", PROGRAM)
            .database("sqlite::memory:")
            .env("OTEL_BSP_SCHEDULE_DELAY", "50");
        for (name, value) in variables {
            serve = serve.env(name, value);
        }
        let node = serve.start(testbed).await.unwrap();
        let listening = node.process().wait_for_log("listening on", PATIENCE);
        listening.await.unwrap();
        let api = ApiClient::new(node.url());
        Self { node, api }
    }

    async fn read(&self) {
        let answer = self.api.get(&format!("/items/{SAMPLE}")).await;
        assert_eq!(answer.status, 200);
    }

    async fn metric(&self, name: &str) -> u64 {
        let metrics = self.api.get("/metrics").await.text();
        let mut lines = metrics.lines();
        let line = lines.find(|line| line.starts_with(&format!("{name} ")));
        let value = line.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
        value.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn dropped(&self, reason: &str) -> u64 {
        self.metric(&format!(r#"otel_dropped_spans_total{{reason="{reason}"}}"#))
            .await
    }

    /// The lines of the log that contain this.
    fn said(&self, part: &str) -> Vec<String> {
        let log = self.node.process().log().unwrap();
        let lines = log.lines().filter(|line| line.contains(part));
        lines.map(str::to_owned).collect()
    }

    async fn stop(self) {
        self.node.process().terminate(PATIENCE).await.unwrap();
    }
}

fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        other => Some(format!("{other:?}")),
    }
}

/// What most compose files say: port 4317, no protocol. The port cannot be had in a test, so the
/// protocol is named here; that the port alone does it is tested where it is decided.
#[tokio::test(flavor = "multi_thread")]
async fn traces_are_sent_over_grpc_with_headers_and_packed() {
    let testbed = Testbed::new().await.unwrap();
    let receiver = Receiver::listen(true, 0, None).await;
    let endpoint = format!("http://{}", receiver.address);
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Basic%20YTpi"),
    ];
    let node = Node::start(&testbed, &variables).await;
    node.read().await;
    receiver.server_spans(1).await;
    {
        let received = receiver.received.lock().unwrap();
        assert_eq!(received[0].path, GRPC_PATH);
        assert_eq!(received[0].headers["authorization"], "Basic YTpi");
        assert_eq!(received[0].headers["grpc-encoding"], "gzip");
    }
    let told = node.said(&format!("traces go to {endpoint} over grpc"));
    assert_eq!(told.len(), 1, "{}", node.node.process().log_tail(20));
    assert!(node.said("WARN").is_empty(), "{:?}", node.said("WARN"));
    assert!(node.said("YTpi").is_empty());
    // Exemplars are in the one format that has them.
    let open_metrics = [("accept", "application/openmetrics-text")];
    let answer = node
        .api
        .send(Method::GET, "/metrics", &open_metrics, None)
        .await;
    assert!(answer.text().contains("# {trace_id="));
    assert!(!node.api.get("/metrics").await.text().contains("trace_id"));
    until("they are counted", async || {
        (node.metric("otel_exported_spans_total").await > 0).then_some(())
    })
    .await;

    // What the receiver refuses is said once and counted.
    receiver.answer.lock().unwrap().partial_success = Some(ExportTracePartialSuccess {
        rejected_spans: 3,
        error_message: "too old".to_owned(),
    });
    for rejections in 1..=2 {
        node.read().await;
        until("the refusal is counted", async || {
            (node.dropped("rejected").await >= 3 * rejections).then_some(())
        })
        .await;
    }
    let told = node.said("refused 3 spans");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("too old"));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_failed_export_is_said_once_and_so_is_the_end_of_it() {
    let testbed = Testbed::new().await.unwrap();
    for grpc in [false, true] {
        let port = free_port();
        let endpoint = format!("http://127.0.0.1:{port}");
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            (
                "OTEL_EXPORTER_OTLP_PROTOCOL",
                if grpc { "grpc" } else { "http/protobuf" },
            ),
        ];
        let node = Node::start(&testbed, &variables).await;
        let mut lost = 0;
        for _ in 0..3 {
            node.read().await;
            lost = until("the spans are counted as lost", async || {
                let now = node.dropped("export_failed").await;
                (now > lost).then_some(now)
            })
            .await;
        }
        let told = node.said("traces cannot be sent");
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].contains("WARN") && told[0].contains(&endpoint),
            "{told:?}"
        );
        assert!(
            told[0].to_lowercase().contains("connection refused"),
            "{told:?}"
        );

        let receiver = Receiver::listen(grpc, port, None).await;
        until("it works again", async || {
            node.read().await;
            (!receiver.spans().is_empty()).then_some(())
        })
        .await;
        node.node
            .process()
            .wait_for_log("again", PATIENCE)
            .await
            .unwrap();
        let told = node.said("traces are sent to");
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(node.metric("otel_exported_spans_total").await > 0);
        assert_eq!(node.said("traces cannot be sent").len(), 1);
        node.stop().await;
    }
}

/// The classic, on a port that does not give it away at start.
#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_protocol_is_said_with_the_remedy() {
    let testbed = Testbed::new().await.unwrap();
    let receiver = Receiver::listen(true, 0, None).await;
    let endpoint = format!("http://{}", receiver.address);
    let node = Node::start(&testbed, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]).await;
    node.read().await;
    node.node
        .process()
        .wait_for_log("traces cannot be sent to", PATIENCE)
        .await
        .unwrap();
    let told = node.said("traces cannot be sent");
    let remedy = "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc";
    assert!(told.len() == 1 && told[0].contains(remedy), "{told:?}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_find_the_queue_full_are_counted() {
    let testbed = Testbed::new().await.unwrap();
    // It accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "4"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "500"),
    ];
    let node = Node::start(&testbed, &variables).await;
    until("the queue is full", async || {
        node.read().await;
        (node.dropped("queue_full").await > 0).then_some(())
    })
    .await;
    node.node
        .process()
        .wait_for_log("traces cannot be sent to", PATIENCE)
        .await
        .unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_behind_tls_is_verified_with_the_given_authority() {
    let testbed = Testbed::new().await.unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let authority = testbed.folder().join("authority.pem");
    fs::write(&authority, made.cert.pem()).unwrap();
    let authority = authority.to_str().unwrap();
    for grpc in [false, true] {
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = rustls::crypto::ring::default_provider();
        let mut server = rustls::ServerConfig::builder_with_provider(provider.into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        server.alpn_protocols = vec![if grpc {
            b"h2".to_vec()
        } else {
            b"http/1.1".to_vec()
        }];
        let tls = TlsAcceptor::from(Arc::new(server));
        let receiver = Receiver::listen(grpc, 0, Some(tls)).await;
        let endpoint = format!("https://{}", receiver.address);
        let mut variables = vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            (
                "OTEL_EXPORTER_OTLP_PROTOCOL",
                if grpc { "grpc" } else { "http/protobuf" },
            ),
        ];
        let stranger = Node::start(&testbed, &variables).await;
        stranger.read().await;
        stranger
            .node
            .process()
            .wait_for_log("traces cannot be sent to", PATIENCE)
            .await
            .unwrap();
        let told = stranger.said("traces cannot be sent");
        assert!(told[0].contains("certificate"), "{told:?}");
        stranger.stop().await;
        assert!(receiver.spans().is_empty());

        variables.push(("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", authority));
        let node = Node::start(&testbed, &variables).await;
        node.read().await;
        receiver.server_spans(1).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_carry_what_the_variables_and_the_caller_say() {
    const CALLER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let testbed = Testbed::new().await.unwrap();
    let (receiver, unused) = (Receiver::http().await, Receiver::http().await);
    let base = format!("http://{}", unused.address);
    let exact = format!("http://{}/own/path", receiver.address);
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", base.as_str()),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", exact.as_str()),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop,team=a%2Cb"),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "9"),
        ("OTEL_LOG_LEVEL", "s3cret"),
        ("OTEL_PROPAGATORS", "b3,tracecontext"),
    ];
    let node = Node::start(&testbed, &variables).await;
    assert_eq!(node.api.get("/health").await.json()["service"], "shop");
    let headers = [("traceparent", CALLER), ("tracestate", "rojo=1,congo=t61")];
    let path = format!("/items/{SAMPLE}");
    node.api.send(Method::GET, &path, &headers, None).await;
    let spans = receiver.server_spans(1).await;
    // Probes and scrapes make no traces.
    assert_eq!(spans[0].name, "GET /items/{id}");
    assert_eq!(spans[0].trace_state, "rojo=1,congo=t61");
    assert_eq!(text(&spans[0].attributes, "url.path").unwrap(), "/items/55");
    {
        let received = receiver.received.lock().unwrap();
        assert_eq!(received[0].path, "/own/path");
        assert_eq!(received[0].headers["content-encoding"], "gzip");
        let resource = received[0].traces.resource_spans[0]
            .resource
            .as_ref()
            .unwrap();
        let found: BTreeMap<_, _> = ["service.name", "team"]
            .map(|name| (name, text(&resource.attributes, name).unwrap()))
            .into();
        assert_eq!(found["service.name"], "shop");
        assert_eq!(found["team"], "a,b");
        assert!(text(&resource.attributes, "service.instance.id").is_some());
    }
    assert!(unused.spans().is_empty());
    let told = node.said("OTEL_LOG_LEVEL");
    assert!(told.len() == 1 && told[0].contains("WARN"), "{told:?}");
    assert_eq!(node.said("OTEL_PROPAGATORS").len(), 1);
    assert!(node.said("s3cret").is_empty());
    node.stop().await;

    // The more specific variable of the name wins.
    let variables = [
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop"),
        ("OTEL_SERVICE_NAME", "till"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", base.as_str()),
        ("OTEL_PROPAGATORS", "none"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "2"),
    ];
    let node = Node::start(&testbed, &variables).await;
    assert_eq!(node.api.get("/health").await.json()["service"], "till");
    let answer = node.api.send(Method::GET, &path, &headers, None).await;
    let spans = unused.server_spans(1).await;
    assert!(spans[0].parent_span_id.is_empty());
    assert_eq!(spans[0].attributes.len(), 2);
    let id: String = spans[0]
        .trace_id
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(answer.header("x-trace-id"), id);
    assert!(!CALLER.contains(&id));
    node.stop().await;
}

/// `RequestTrace` decides with the id it makes up, and the library used to decide again with its own
/// id: of a tenth of the requests only a tenth was sent.
#[tokio::test(flavor = "multi_thread")]
async fn the_ratio_of_the_sampler_is_applied_once() {
    const REQUESTS: usize = 300;
    let testbed = Testbed::new().await.unwrap();
    let receiver = Receiver::http().await;
    let endpoint = format!("http://{}", receiver.address);
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_TRACES_SAMPLER", "traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.3"),
    ];
    let node = Node::start(&testbed, &variables).await;
    for _ in 0..REQUESTS {
        node.read().await;
    }
    // 90 are expected, and 27 if it is applied twice; both by far more than their deviations.
    receiver.server_spans(55).await;
    node.stop().await;
    assert!(receiver.server_spans(55).await.len() < 150);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_exporter_writes_spans_and_the_switches_switch_them_off() {
    let testbed = Testbed::new().await.unwrap();
    let receiver = Receiver::http().await;
    let endpoint = format!("http://{}", receiver.address);
    let console = [
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
    ];
    let node = Node::start(&testbed, &console).await;
    node.read().await;
    let line = node
        .node
        .process()
        .wait_for_log(r#""kind":"server""#, PATIENCE)
        .await
        .unwrap();
    let line = line
        .lines()
        .find(|line| line.contains(r#""kind":"server""#))
        .unwrap();
    let span: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(span["name"], "GET /items/{id}");
    assert_eq!(span["attributes"]["http.response.status_code"], "200");
    node.stop().await;

    for switch in [
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
    ] {
        let variables = [switch, ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str())];
        let node = Node::start(&testbed, &variables).await;
        node.read().await;
        assert!(node.said("WARN").is_empty() && node.said("traces go to").is_empty());
        // It sends what it has before it ends.
        node.stop().await;
    }
    assert!(receiver.spans().is_empty());
}

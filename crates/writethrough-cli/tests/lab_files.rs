//! The lab's files: they parse, they refer only to what exists, and every expression of every panel
//! and rule has data in a real Prometheus while the service is under load.

#![allow(clippy::unwrap_used)]

#[path = "../../writethrough-service/tests/support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use serde_yaml_ng::Value as Yaml;
use support::{ApiClient, SAMPLE, Service, config};
use writethrough_service::config::{CacheBackend, Config, Database, ServeArgs};
use writethrough_service::middleware::access::{AdminAccess, AllowedHosts};
use writethrough_testbed::{ChildSpec, Testbed, find_program};

const PROGRAM: &str = env!("CARGO_BIN_EXE_writethrough");
const DASHBOARDS: [&str; 2] = ["write-through", "service"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(path: &str) -> String {
    let file = root().join(path);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// A YAML file as JSON values; aliases are resolved and tags (`!reset`) dropped.
fn yaml(path: &str) -> Value {
    let parsed: Yaml =
        serde_yaml_ng::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    json_of(parsed)
}

fn json_of(yaml: Yaml) -> Value {
    match yaml {
        Yaml::Tagged(tagged) => json_of(tagged.value),
        Yaml::Sequence(items) => items.into_iter().map(json_of).collect(),
        Yaml::Mapping(entries) => entries
            .into_iter()
            .map(|(key, value)| (key.as_str().unwrap().to_owned(), json_of(value)))
            .collect(),
        plain => serde_json::to_value(plain).unwrap(),
    }
}

fn json(path: &str) -> Value {
    serde_json::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn keys(value: &Value) -> BTreeSet<&str> {
    let entries = value.as_object().into_iter().flatten();
    entries.map(|(name, _)| name.as_str()).collect()
}

fn strings(value: &Value) -> Vec<&str> {
    let items = value.as_array().into_iter().flatten();
    items.map(|item| item.as_str().unwrap()).collect()
}

/// `${NAME:-default}` becomes its default, as compose does when nothing is set.
fn with_defaults(text: &str) -> String {
    let mut rest = text;
    let mut plain = String::new();
    while let Some((before, after)) = rest.split_once("${") {
        let (variable, after) = after.split_once('}').unwrap();
        let (_, default) = variable.split_once(":-").unwrap();
        plain.push_str(before);
        plain.push_str(default);
        rest = after;
    }
    plain + rest
}

/// The service that listens for each `host:port` of the stack, as its configuration says.
fn endpoints() -> BTreeMap<&'static str, BTreeSet<u16>> {
    let collector = yaml("lab/collector/config.yaml");
    let jaeger = yaml("lab/jaeger/config.yaml");
    let port = |value: &Value| -> u16 {
        let (_, port) = value.as_str().unwrap().rsplit_once(':').unwrap();
        port.parse().unwrap()
    };
    let protocols = |config: &Value| -> Vec<u16> {
        ["grpc", "http"]
            .map(|name| port(&config["receivers"]["otlp"]["protocols"][name]["endpoint"]))
            .into()
    };
    let reader = &collector["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"];
    let mut collector_ports = protocols(&collector);
    collector_ports.push(port(&collector["exporters"]["prometheus"]["endpoint"]));
    collector_ports.push(port(&collector["extensions"]["health_check"]["endpoint"]));
    collector_ports.push(u16::try_from(reader["prometheus"]["port"].as_u64().unwrap()).unwrap());
    let mut jaeger_ports = protocols(&jaeger);
    jaeger_ports.push(port(
        &jaeger["extensions"]["jaeger_query"]["http"]["endpoint"],
    ));
    jaeger_ports.push(port(
        &jaeger["extensions"]["healthcheckv2"]["http"]["endpoint"],
    ));
    BTreeMap::from([
        ("api", BTreeSet::from([8000])),
        ("postgres", BTreeSet::from([5432])),
        ("redis", BTreeSet::from([6379])),
        ("prometheus", BTreeSet::from([9090])),
        ("grafana", BTreeSet::from([3000])),
        ("otel-collector", collector_ports.into_iter().collect()),
        ("jaeger", jaeger_ports.into_iter().collect()),
    ])
}

/// Checks that `address`, a URL or `host:port`, is served by the stack.
fn assert_served(address: &str, by: &str) {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let rest = rest.rsplit('@').next().unwrap();
    let rest = rest.split('/').next().unwrap();
    let (host, port) = rest.split_once(':').unwrap();
    let endpoints = endpoints();
    let ports = endpoints.get(host);
    assert!(
        ports.is_some_and(|ports| ports.contains(&port.parse().unwrap())),
        "{by} refers to {address}, which nothing serves"
    );
}

#[test]
fn compose_has_what_the_contract_promises_and_refers_only_to_what_exists() {
    let compose = yaml("compose.yaml");
    assert!(!text("compose.yaml").contains("ulimits"));
    let services = compose["services"].as_object().unwrap();
    let promised = [
        "api",
        "check",
        "grafana",
        "jaeger",
        "k6",
        "otel-collector",
        "postgres",
        "prometheus",
        "redis",
    ];
    assert_eq!(keys(&compose["services"]), BTreeSet::from(promised));
    for (name, service) in services {
        let image = service["image"].as_str().unwrap();
        assert!(image.starts_with("${") && image.contains(":-"), "{image}");
        let tag = with_defaults(image);
        assert!(!tag.ends_with(":latest"), "{tag}");
        assert!(
            tag.contains(':') || service["build"].is_object(),
            "{tag} is not pinned"
        );
        assert!(service["healthcheck"]["test"].is_array(), "{name}");
        let limits = &service["deploy"]["resources"]["limits"];
        assert!(
            limits["memory"].is_string() && limits["cpus"].is_string(),
            "{name}"
        );
        let on_demand = ["k6", "check"].contains(&name.as_str());
        assert_eq!(service["profiles"].is_array(), on_demand, "{name}");
        for (other, how) in service["depends_on"].as_object().into_iter().flatten() {
            assert!(services.contains_key(other), "{name} depends on {other}");
            assert_eq!(how["condition"], "service_healthy", "{name} on {other}");
        }
        for volume in strings(&service["volumes"]) {
            let source = volume.split(':').next().unwrap();
            if source.starts_with('.') {
                assert!(root().join(source).exists(), "{name}: {source}");
                assert!(volume.ends_with(":ro"), "{name}: {volume}");
            } else {
                assert!(
                    keys(&compose["volumes"]).contains(source),
                    "{name}: {source}"
                );
            }
        }
    }
    let published = |name: &str| with_defaults(services[name]["ports"][0].as_str().unwrap());
    assert_eq!(published("api"), "127.0.0.1:8000:8000");
    assert_eq!(published("jaeger"), "127.0.0.1:16686:16686");
    assert_eq!(published("prometheus"), "127.0.0.1:9090:9090");
    assert_eq!(published("grafana"), "127.0.0.1:3001:3000");
    let postgres = &services["postgres"]["environment"];
    assert_eq!(postgres["POSTGRES_USER"], "labuser");
    assert_eq!(postgres["POSTGRES_DB"], "items_db");
    let grafana = &services["grafana"]["environment"];
    assert_eq!(grafana["GF_SECURITY_ADMIN_USER"], "admin");
    assert_eq!(grafana["GF_SECURITY_ADMIN_PASSWORD"], "admin");
    assert!(strings(&services["k6"]["volumes"]).contains(&"./lab/k6:/scripts:ro"));
    assert_served(
        services["k6"]["environment"]["BASE_URL"].as_str().unwrap(),
        "k6",
    );

    // The variation adds to it.
    let scale = yaml("lab/scale/compose.yaml");
    assert_eq!(keys(&scale["services"]), BTreeSet::from(["api", "gateway"]));
    assert!(
        scale["services"]["api"]["ports"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    assert!(text("lab/scale/nginx.conf").contains("server api:8000"));
}

#[test]
fn the_service_accepts_its_environment_and_finds_its_neighbours() {
    let compose = yaml("compose.yaml");
    let api = &compose["services"]["api"];
    let environment: BTreeMap<&str, String> = api["environment"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, value)| (name.as_str(), with_defaults(value.as_str().unwrap())))
        .collect();
    let variable = |name: &str| Some(environment[name].clone());
    let args = ServeArgs {
        listen: variable("LISTEN_ADDR"),
        database: variable("POSTGRES_URL"),
        cache: variable("REDIS_URL"),
        ttl: variable("CACHE_TTL_SECONDS"),
        consistency: variable("CONSISTENCY"),
        service_name: variable("OTEL_SERVICE_NAME"),
        otlp_endpoint: variable("OTEL_EXPORTER_OTLP_ENDPOINT"),
        log_format: variable("LOG_FORMAT"),
        admin_token: variable("ADMIN_TOKEN"),
        allowed_hosts: variable("ALLOWED_HOSTS"),
        ..ServeArgs::default()
    };
    let config = Config::from_args(&args, |_| None).unwrap();
    // What the exercises send comes from the network of the containers, and without a token.
    assert_eq!(config.admin, AdminAccess::Anyone);
    let hosts = AllowedHosts::Names(vec!["localhost".to_owned()]);
    assert_eq!(config.allowed_hosts, Some(hosts));
    // All addresses, of both protocols.
    assert_eq!(config.listen.to_string(), "[::]:8000");
    let (Database::Postgres(database), CacheBackend::Redis(cache)) =
        (&config.database, &config.cache)
    else {
        panic!("not on Postgres and Redis");
    };
    assert!(
        database.starts_with("postgres://labuser:")
            && database.ends_with("/items_db?sslmode=disable")
    );
    let traces = &config.traces.otlp.as_ref().unwrap().endpoint;
    for address in [database, cache, traces] {
        assert_served(address, "api");
    }
    // Every variable is one that the program reads.
    let help = Command::new(PROGRAM)
        .args(["serve", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for name in environment.keys() {
        // One of those without a flag.
        assert!(
            help.contains(name) || *name == "OTEL_BSP_SCHEDULE_DELAY",
            "{name}"
        );
    }
    assert_eq!(api["read_only"], true);
    assert_eq!(api["user"], "65532:65532");
}

#[test]
fn the_dockerfile_has_every_target_and_argument_and_gives_a_bare_image() {
    let compose = yaml("compose.yaml");
    let dockerfile = text("Dockerfile");
    let stages: Vec<(&str, &str)> = dockerfile
        .lines()
        .filter_map(|line| line.strip_prefix("FROM ")?.split_once(" AS "))
        .collect();
    let defaults: BTreeMap<&str, &str> = dockerfile
        .lines()
        .filter_map(|line| line.strip_prefix("ARG ")?.split_once('='))
        .collect();
    for service in ["api", "otel-collector", "jaeger"] {
        let service = &compose["services"][service];
        let target = service["build"]["target"].as_str().unwrap();
        assert!(stages.iter().any(|(_, name)| *name == target), "{target}");
        let arguments = service["build"]["args"].as_object().unwrap();
        assert_eq!(arguments.len(), defaults.len());
        for (name, value) in arguments {
            assert_eq!(
                defaults[name.as_str()],
                with_defaults(value.as_str().unwrap())
            );
        }
        // Images without a shell have only the probe to ask with, and it is in each of them.
        let test = strings(&service["healthcheck"]["test"]);
        assert_eq!(test[..3], ["CMD", "/writethrough", "health"]);
        if let Some(at) = test.iter().position(|word| *word == "--listen") {
            let (_, port) = test[at + 1].split_once(':').unwrap();
            assert_served(&format!("{target}:{port}"), "its health check");
        }
    }
    assert_eq!(*stages.last().unwrap(), ("scratch", "api"));
    // What serves has neither the checker nor the lab in it, and the checker is an image of its own.
    let target = compose["services"]["check"]["build"]["target"].as_str();
    assert!(stages.contains(&("scratch", target.unwrap())));
    let built = |stage: &str| {
        let (_, rest) = dockerfile.split_once(&format!(" AS {stage}\n")).unwrap();
        let stage = rest.split("\nFROM ").next().unwrap();
        let (_, build) = stage.split_once("--package writethrough-cli").unwrap();
        build
            .lines()
            .next()
            .unwrap()
            .trim_matches([' ', '\\'])
            .to_owned()
    };
    assert_eq!(built("build"), "--no-default-features");
    assert_eq!(
        built("build-check"),
        "--no-default-features --features check"
    );
    let (_, last) = dockerfile.rsplit_once("FROM ").unwrap();
    let port = last.lines().find_map(|line| line.strip_prefix("ENV PORT="));
    let listen = writethrough_service::config::listen(&None, |name| {
        (name == "PORT").then(|| port.unwrap().to_owned())
    });
    assert_eq!(listen.unwrap().to_string(), "[::]:8000");
    assert!(last.contains("\nUSER 65532:65532\n") && last.contains("\nHEALTHCHECK "));
    // What is compiled in or listed in the workspace must be part of the build's context.
    let context = text(".dockerignore");
    for kept in [
        "!Cargo.toml",
        "!Cargo.lock",
        "!crates",
        "!xtask",
        "!lab/prometheus",
    ] {
        assert!(context.lines().any(|line| line == kept), "{kept}");
    }
}

#[test]
fn collector_and_jaeger_use_only_what_they_define_and_reach_only_what_exists() {
    for file in ["lab/collector/config.yaml", "lab/jaeger/config.yaml"] {
        let config = yaml(file);
        let defined = |kinds: &[&str]| -> BTreeSet<&str> {
            kinds.iter().flat_map(|kind| keys(&config[*kind])).collect()
        };
        let mut used = BTreeSet::new();
        for extension in strings(&config["service"]["extensions"]) {
            assert!(
                defined(&["extensions"]).contains(extension),
                "{file}: {extension}"
            );
        }
        for pipeline in config["service"]["pipelines"].as_object().unwrap().values() {
            for (part, kinds) in [
                ("receivers", &["receivers", "connectors"][..]),
                ("processors", &["processors"]),
                ("exporters", &["exporters", "connectors"]),
            ] {
                for name in strings(&pipeline[part]) {
                    assert!(defined(kinds).contains(name), "{file}: {name}");
                    used.insert(name.to_owned());
                }
            }
        }
        let all = defined(&["receivers", "processors", "exporters", "connectors"]);
        assert_eq!(
            used,
            all.iter().map(|name| (*name).to_owned()).collect(),
            "{file}"
        );
        assert!(!all.contains("batch"), "batching is the exporter's task");
    }
    let collector = yaml("lab/collector/config.yaml");
    let exporter = collector["exporters"]["otlp_grpc"]["endpoint"]
        .as_str()
        .unwrap();
    assert_served(exporter, "the collector");
    let jaeger = yaml("lab/jaeger/config.yaml");
    let extensions = &jaeger["extensions"];
    let (storage, query) = (
        &extensions["jaeger_storage"],
        &extensions["jaeger_query"]["storage"],
    );
    let traces = query["traces"].as_str().unwrap();
    assert!(storage["backends"][traces].is_object());
    assert_eq!(
        jaeger["exporters"]["jaeger_storage_exporter"]["trace_storage"],
        traces
    );
    let metrics = &storage["metric_backends"][query["metrics"].as_str().unwrap()];
    assert_served(
        metrics["prometheus"]["endpoint"].as_str().unwrap(),
        "jaeger",
    );

    let prometheus = yaml("lab/prometheus/prometheus.yml");
    for job in prometheus["scrape_configs"].as_array().unwrap() {
        for group in job["static_configs"].as_array().into_iter().flatten() {
            for target in strings(&group["targets"]) {
                assert_served(&target.replace("localhost", "prometheus"), "prometheus");
            }
        }
        for found in job["dns_sd_configs"].as_array().into_iter().flatten() {
            for name in strings(&found["names"]) {
                assert_served(&format!("{name}:{}", found["port"]), "prometheus");
            }
        }
    }
    for file in strings(&prometheus["rule_files"]) {
        assert!(root().join("lab/prometheus").join(file).exists());
    }
}

#[test]
fn every_link_of_the_pages_leads_somewhere() {
    let mut pages = vec![root().join("lab/README.md")];
    let exercises = std::fs::read_dir(root().join("lab/exercises")).unwrap();
    pages.extend(exercises.map(|entry| entry.unwrap().path()));
    assert_eq!(pages.len(), 13);
    let mut links = 0;
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for (at, _) in text.match_indices("](") {
            let link = text[at + 2..].split(')').next().unwrap();
            let path = link.split('#').next().unwrap();
            if link.contains("://") || path.is_empty() {
                continue;
            }
            links += 1;
            let target = page.parent().unwrap().join(path);
            assert!(target.exists(), "{}: {link}", page.display());
        }
    }
    assert!(links > 15, "{links}");
}

#[test]
fn grafana_provisions_what_its_dashboards_use() {
    let sources = yaml("lab/grafana/provisioning/datasources/datasources.yml");
    let sources = sources["datasources"].as_array().unwrap();
    let uids: BTreeSet<&str> = sources
        .iter()
        .map(|one| one["uid"].as_str().unwrap())
        .collect();
    for source in sources {
        assert_served(source["url"].as_str().unwrap(), "grafana");
    }
    let find = |uid: &str| sources.iter().find(|one| one["uid"] == uid).unwrap();
    let exemplars = &find("prometheus")["jsonData"]["exemplarTraceIdDestinations"][0];
    assert_eq!(exemplars["datasourceUid"], "jaeger");
    assert_eq!(exemplars["name"], "trace_id");
    assert_eq!(
        find("jaeger")["jsonData"]["tracesToMetrics"]["datasourceUid"],
        "prometheus"
    );

    let compose = yaml("compose.yaml");
    let grafana = &compose["services"]["grafana"];
    let providers = yaml("lab/grafana/provisioning/dashboards/dashboards.yml");
    let path = providers["providers"][0]["options"]["path"]
        .as_str()
        .unwrap();
    let mount = format!("./lab/grafana/dashboards:{path}:ro");
    assert!(strings(&grafana["volumes"]).contains(&mount.as_str()));
    let home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        .as_str()
        .unwrap();
    let home = home.strip_prefix(path).unwrap();
    assert!(
        root()
            .join("lab/grafana/dashboards")
            .join(&home[1..])
            .exists()
    );

    let titles = DASHBOARDS.map(|name| {
        let dashboard = json(&format!("lab/grafana/dashboards/{name}.json"));
        assert_eq!(dashboard["uid"], name);
        let mut ids = BTreeSet::new();
        let mut places = BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            assert!(
                ids.insert(panel["id"].as_u64().unwrap()),
                "{name}: an id twice"
            );
            let place = &panel["gridPos"];
            assert!(
                places.insert((place["x"].as_u64(), place["y"].as_u64())),
                "{panel}"
            );
            if panel["type"] == "row" {
                continue;
            }
            assert!(uids.contains(panel["datasource"]["uid"].as_str().unwrap()));
            assert!(!panel["targets"].as_array().unwrap().is_empty());
            for target in panel["targets"].as_array().unwrap() {
                assert!(uids.contains(target["datasource"]["uid"].as_str().unwrap()));
            }
        }
        dashboard["title"].as_str().unwrap().to_owned()
    });
    assert_eq!(titles, ["Write-through", "Service"]);
}

#[test]
fn promtool_accepts_the_rules_and_their_tests_pass() {
    let promtool = |args: &[&str]| -> Output {
        let mut command = Command::new(find_program("promtool").unwrap());
        command
            .args(args)
            .current_dir(root().join("lab/prometheus"));
        command.output().unwrap()
    };
    for args in [
        &["check", "config", "prometheus.yml"][..],
        &["check", "rules", "recording.yml", "alerts.yml"],
        &["test", "rules", "rules_test.yml"],
    ] {
        let output = promtool(args);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success(), "{args:?}: {said}");
    }
    // Each alert is in the tests once as quiet and once as firing.
    let tests = yaml("lab/prometheus/rules_test.yml");
    let named = |test: &Value| -> BTreeSet<String> {
        let cases = test["alert_rule_test"].as_array().unwrap();
        let names = cases
            .iter()
            .map(|case| case["alertname"].as_str().unwrap().to_owned());
        names.collect()
    };
    let alerts: BTreeSet<String> = rules("lab/prometheus/alerts.yml")
        .iter()
        .map(|rule| rule["alert"].as_str().unwrap().to_owned())
        .collect();
    for test in tests["tests"].as_array().unwrap() {
        assert_eq!(named(test), alerts);
    }
}

/// What `curl :8000/metrics | promtool check metrics` says.
#[tokio::test(flavor = "multi_thread")]
async fn promtool_has_nothing_to_say_against_the_metrics() {
    let service = Service::start(config(Database::Temporary, CacheBackend::InProcess)).await;
    let service = service.cached().await;
    let path = service.create("Lamp").await;
    for path in [&path, "/items", "/nothing"] {
        service.get(path).await;
    }
    service.delete(&path).await;
    let metrics = service.get("/metrics").await;
    service.running.shutdown().await;

    let mut promtool = Command::new(find_program("promtool").unwrap())
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(&metrics.body).unwrap();
    drop(stdin);
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

fn rules(path: &str) -> Vec<Value> {
    let file = yaml(path);
    let groups = file["groups"].as_array().unwrap();
    groups
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap().clone())
        .collect()
}

/// Every expression of the lab, by where it stands. A comparison at the end, which makes an alert or
/// an annotation, is left out: what it compares must have data.
fn expressions() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for name in DASHBOARDS {
        let dashboard = json(&format!("lab/grafana/dashboards/{name}.json"));
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let place = format!("{name}, panel {}", panel["title"]);
                all.push((place, target["expr"].as_str().unwrap().to_owned()));
            }
        }
        for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
            let place = format!("{name}, annotation {}", annotation["name"]);
            all.push((place, annotation["expr"].as_str().unwrap().to_owned()));
        }
    }
    for file in ["recording", "alerts"] {
        for rule in rules(&format!("lab/prometheus/{file}.yml")) {
            let name = rule["record"].as_str().or(rule["alert"].as_str()).unwrap();
            all.push((
                format!("rule {name}"),
                rule["expr"].as_str().unwrap().to_owned(),
            ));
        }
    }
    for (_, expression) in &mut all {
        *expression = without_comparison(expression)
            .replace("$__rate_interval", "1m")
            .replace("$node", ".*");
        assert!(!expression.contains('$'), "{expression}");
    }
    all
}

fn without_comparison(expression: &str) -> &str {
    for operator in [" > ", " < ", " == "] {
        if let Some((compared, number)) = expression.rsplit_once(operator)
            && number.trim().parse::<f64>().is_ok()
        {
            return compared;
        }
    }
    expression
}

#[test]
fn only_a_comparison_at_the_end_is_left_out() {
    assert_eq!(without_comparison("a > 0.5"), "a");
    assert_eq!(without_comparison("a / (b > 0)"), "a / (b > 0)");
    assert_eq!(without_comparison("max(a) == 1"), "max(a)");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_expression_has_data_while_the_service_is_under_load() {
    let testbed = Testbed::new().await.unwrap();
    let folder = testbed.folder().join("writethrough-lab");
    // A lab that finds no Prometheus goes on without it; here that is an error.
    find_program("prometheus").unwrap();
    let spec = ChildSpec::new("lab", PROGRAM)
        .args(["lab", "--listen", "127.0.0.1:0", "--nodes", "2"])
        .env("WRITETHROUGH_LAB", &folder);
    let lab = testbed.child(spec).await.unwrap();
    let patience = Duration::from_secs(60);
    lab.wait_for_log("The lab is ready", patience)
        .await
        .unwrap();
    let log = lab.log().unwrap();
    let url_of = |name: &str| -> String {
        let line = log.lines().find(|line| line.trim_start().starts_with(name));
        let mut words = line
            .unwrap_or_else(|| panic!("no {name} in {log}"))
            .split_whitespace();
        words
            .find(|word| word.starts_with("http://"))
            .unwrap()
            .to_owned()
    };
    let api = ApiClient::new(url_of("api "));
    let prometheus = ApiClient::new(url_of("prometheus "));

    let stop = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn(load(api.clone(), stop.clone()));

    let mut missing = expressions();
    assert!(missing.len() > 50, "{}", missing.len());
    assert!(!has_data(&prometheus, "sum(rate(no_such_metric[1m]))").await);
    let started = Instant::now();
    let bound = Duration::from_secs(120);
    while !missing.is_empty() {
        let mut still = Vec::new();
        for (place, expression) in missing {
            if !has_data(&prometheus, &expression).await {
                still.push((place, expression));
            }
        }
        missing = still;
        assert!(started.elapsed() < bound, "without data: {missing:#?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }

    // The rules are loaded and evaluated, and traces hang on the buckets.
    let answer = prometheus.get("/api/v1/rules").await.json();
    let groups = answer["data"]["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 2);
    for rule in groups
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap())
    {
        assert_eq!(rule["health"], "ok", "{rule}");
    }
    let query = "/api/v1/query_exemplars?query=http_server_request_duration_seconds_bucket\
                 &start=0&end=99999999999";
    let exemplars = prometheus.get(query).await.json();
    let exemplars = exemplars["data"].as_array().unwrap();
    let first = &exemplars[0]["exemplars"][0]["labels"]["trace_id"];
    assert_eq!(first.as_str().map(str::len), Some(32), "{exemplars:?}");

    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    lab.terminate(Duration::from_secs(20)).await.unwrap();
}

/// Whether a query gives at least one number.
async fn has_data(prometheus: &ApiClient, expression: &str) -> bool {
    let encoded: String = expression
        .bytes()
        .map(|byte| format!("%{byte:02X}"))
        .collect();
    let answer = prometheus
        .get(&format!("/api/v1/query?query={encoded}"))
        .await;
    let answer = answer.json();
    assert_eq!(answer["status"], "success", "{expression}: {answer}");
    let result = answer["data"]["result"].as_array().unwrap();
    result.iter().any(|series| {
        let value = series["value"][1].as_str().unwrap();
        value.parse::<f64>().is_ok_and(f64::is_finite)
    })
}

/// Reads, lists and writes until told to stop; fast enough for data, slow enough for a busy machine.
async fn load(api: ApiClient, stop: Arc<AtomicBool>) {
    let sample = format!("/items/{SAMPLE}");
    let mut turn = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let body = format!(r#"{{"name": "Lamp", "price": {turn}}}"#);
        for _ in 0..4 {
            api.get(&sample).await;
        }
        api.get("/items").await;
        api.put(&sample, &body).await;
        let created = api.post("/items", &body).await;
        if let Some(id) = created.json()["id"].as_str() {
            let path = format!("/items/{id}");
            api.get(&path).await;
            api.send(reqwest::Method::DELETE, &path, &[], None).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

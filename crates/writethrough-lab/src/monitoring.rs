//! Prometheus for the lab, with the rules of `lab/prometheus`, if the machine has it.

use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use writethrough_testbed::{Child, ChildSpec, Testbed, find_program, free_port, until};

use crate::cluster::get;

/// The configuration for the containers; its part before the targets is used here too.
const CONFIGURATION: &str = include_str!("../../../lab/prometheus/prometheus.yml");
/// The rules, by file name.
const RULES: [(&str, &str); 2] = [
    (
        "recording.yml",
        include_str!("../../../lab/prometheus/recording.yml"),
    ),
    (
        "alerts.yml",
        include_str!("../../../lab/prometheus/alerts.yml"),
    ),
];
/// Where people look for it first.
const USUAL_PORT: u16 = 9090;
const READY_BOUND: Duration = Duration::from_secs(20);

/// Starts Prometheus; `Err` within tells why there is none.
pub(crate) async fn start(
    testbed: &Testbed,
    nodes: &[SocketAddr],
) -> anyhow::Result<Result<(Child, SocketAddr), String>> {
    let Ok(program) = find_program("prometheus") else {
        return Ok(Err("not installed (Debian package prometheus)".to_owned()));
    };
    let usual: SocketAddr = (Ipv4Addr::LOCALHOST, USUAL_PORT).into();
    let address = match TcpListener::bind(usual) {
        Ok(_) => usual,
        Err(_) => (Ipv4Addr::LOCALHOST, free_port()).into(),
    };
    let folder = testbed.folder().join("prometheus");
    std::fs::create_dir(&folder)?;
    let file = folder.join("prometheus.yml");
    std::fs::write(&file, configuration(nodes, address))?;
    for (name, text) in RULES {
        std::fs::write(folder.join(name), text)?;
    }
    let spec = ChildSpec::new("prometheus", program)
        .arg(format!("--config.file={}", file.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            folder.join("data").display()
        ))
        .arg(format!("--web.listen-address={address}"))
        .arg("--enable-feature=exemplar-storage")
        .arg("--log.level=warn")
        .folder(&folder);
    let child = testbed.child(spec).await?;
    until(
        "Prometheus to be ready, see its log",
        READY_BOUND,
        || async {
            if !child.is_running() {
                return Some(());
            }
            let (status, _) = get(address, "/-/ready").await?;
            status.is_success().then_some(())
        },
    )
    .await?;
    if !child.is_running() {
        return Ok(Err(format!("it ended: {}", child.log_tail(1).trim())));
    }
    Ok(Ok((child, address)))
}

/// The configuration with the lab's own targets.
fn configuration(nodes: &[SocketAddr], prometheus: SocketAddr) -> String {
    let mut text = CONFIGURATION
        .split_inclusive("scrape_configs:\n")
        .next()
        .unwrap_or_default()
        .to_owned();
    let list = |addresses: &[SocketAddr]| {
        let quoted: Vec<_> = addresses.iter().map(|at| format!("'{at}'")).collect();
        quoted.join(", ")
    };
    for (job, targets) in [("api", list(nodes)), ("prometheus", list(&[prometheus]))] {
        let _ = write!(
            text,
            "  - job_name: {job}\n    static_configs:\n      - targets: [{targets}]\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_and_intervals_stay_and_only_the_targets_are_the_labs() {
        let nodes = ["127.0.0.1:8000", "127.0.0.1:8001"].map(|at| at.parse().unwrap());
        let text = configuration(&nodes, "127.0.0.1:9090".parse().unwrap());
        for (name, _) in RULES {
            assert!(text.contains(name), "{text}");
        }
        assert!(text.contains("scrape_interval:"));
        assert!(text.contains("targets: ['127.0.0.1:8000', '127.0.0.1:8001']"));
        assert!(!text.contains("otel-collector"));
    }
}

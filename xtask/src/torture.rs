//! `cargo xtask torture`: the same faults against `textbook`, `off` and `strict`, and a table that compares them.
//!
//! All three see the same schedule and the same workload, by seed. Nothing is judged here: `writethrough check` does that.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use pico_args::Arguments;
use serde_json::Value;

use crate::command::{self, End};
use crate::{interrupt, root};

pub(crate) const USAGE: &str = "\
cargo xtask torture [--minutes M] [--seed N] [--out FILE]

Builds the program, then runs `writethrough check` on three nodes under faults of every kind: with
--consistency textbook, off and strict, the same schedule each time. Prints a table that compares
them. Fails unless strict and off show no anomaly and textbook shows some.

  --minutes M   how long each of the three is tortured (default 2)
  --seed N      seed of the workload and of the schedule (default 1)
  --out FILE    write the table to this file too
";

/// How long compiling may take.
const BUILD_BOUND: Duration = Duration::from_secs(60 * 60);
/// How long a run may take beyond its minutes: start, audit, judging.
const SLACK: Duration = Duration::from_secs(600);
/// How often a sign of life is given.
const QUIET: Duration = Duration::from_secs(30);

const MODES: [&str; 3] = ["textbook", "off", "strict"];

#[derive(Debug, PartialEq, Eq)]
struct Options {
    minutes: u64,
    seed: u64,
    out: Option<PathBuf>,
}

impl Options {
    fn parse(mut arguments: Arguments) -> anyhow::Result<Self> {
        let options = Self {
            minutes: arguments.opt_value_from_str("--minutes")?.unwrap_or(2),
            seed: arguments.opt_value_from_str("--seed")?.unwrap_or(1),
            out: arguments.opt_value_from_str("--out")?,
        };
        ensure!(options.minutes > 0, "`--minutes` must be at least 1");
        crate::finish(arguments)?;
        Ok(options)
    }

    /// The arguments of `writethrough` for one mode.
    fn check(&self, mode: &str) -> Vec<String> {
        let (minutes, seed) = (self.minutes, self.seed);
        let text = format!(
            "check --cluster nodes=3 --consistency {mode} --duration {minutes}m --seed {seed} \
             --schedule-seed {seed} --judge-limit 5m --json"
        );
        text.split(' ').map(str::to_owned).collect()
    }
}

/// Runs the task.
pub(crate) fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let options = Options::parse(arguments)?;
    interrupt::listen();
    build()?;
    let mut results = Vec::new();
    for mode in MODES {
        println!("== {mode}: {} min under faults ==", options.minutes);
        let result = run(&options, mode)?;
        println!("{}", brief(&result));
        results.push(result);
    }
    let page = page(&options, &results);
    println!("\n{page}");
    if let Some(path) = &options.out {
        let path = root().join(path);
        std::fs::write(&path, &page).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    let faults = verdict(&results);
    for fault in &faults {
        println!("FAILED: {fault}");
    }
    Ok(if faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn build() -> anyhow::Result<()> {
    println!("== building ==");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build
        .args(["build", "--release", "-p", "writethrough-cli"])
        .current_dir(root());
    let (end, text) = command::output(build, Instant::now() + BUILD_BOUND)?;
    ensure!(end.ok(), "building failed: {}\n{text}", end.describe());
    Ok(())
}

/// The program that was built.
fn program() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("release/writethrough")
}

fn run(options: &Options, mode: &str) -> anyhow::Result<Value> {
    let mut check = Command::new(program());
    check.args(options.check(mode)).current_dir(root());
    let started = Instant::now();
    let deadline = started + Duration::from_secs(options.minutes * 60) + SLACK;
    let (mut text, mut said) = (String::new(), started);
    let end = command::run(check, deadline, |line| {
        if let Some(line) = line {
            text.push_str(line);
            text.push('\n');
        } else if said.elapsed() >= QUIET {
            said = Instant::now();
            println!("   {} s", started.elapsed().as_secs());
        }
    })?;
    let judged = matches!(end, End::Exited(status) if matches!(status.code(), Some(0 | 1)));
    ensure!(
        judged,
        "{mode} could not be judged: {}\n{text}",
        end.describe()
    );
    // Whatever was said before it is not part of it.
    let json = text.find('{').map_or("", |at| &text[at..]);
    serde_json::from_str(json).with_context(|| format!("{mode} gave no result:\n{text}"))
}

fn number(result: &Value, path: &str) -> f64 {
    result.pointer(path).and_then(Value::as_f64).unwrap_or(0.0)
}

fn anomalies(result: &Value) -> u64 {
    let kinds = result["anomalies"].as_array();
    kinds
        .into_iter()
        .flatten()
        .map(|kind| kind["count"].as_u64().unwrap_or(0))
        .sum()
}

fn count(result: &Value, path: &str) -> usize {
    let list = result.pointer(path).and_then(Value::as_array);
    list.map_or(0, Vec::len)
}

fn brief(result: &Value) -> String {
    format!(
        "   {}: {} operations, {} faults, {} anomalies",
        result["verdict"].as_str().unwrap_or("?"),
        grouped(number(result, "/operations")),
        count(result, "/faults"),
        grouped(anomalies(result) as f64),
    )
}

/// What speaks against the project.
fn verdict(results: &[Value]) -> Vec<String> {
    let mut faults = Vec::new();
    for (mode, result) in MODES.iter().zip(results) {
        let clean = result["verdict"] == "linearizable";
        match *mode {
            "textbook" if clean => faults.push("textbook was not caught".to_owned()),
            "textbook" => {}
            mode if !clean => faults.push(format!(
                "{mode} is {}, with {} anomalies and {} differences",
                result["verdict"],
                anomalies(result),
                number(result, "/audit/difference_count")
            )),
            "strict" => {
                let broken = result["promises_broken"].as_array().into_iter().flatten();
                faults.extend(broken.filter_map(Value::as_str).map(str::to_owned));
            }
            _ => {}
        }
    }
    faults
}

/// A whole number, with a space between thousands.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

fn page(options: &Options, results: &[Value]) -> String {
    type Cell = fn(&Value) -> String;
    let rows: &[(&str, Cell)] = &[
        ("operations", |r| grouped(number(r, "/operations"))),
        ("faults", |r| count(r, "/faults").to_string()),
        ("**anomalies**", |r| {
            format!("**{}**", grouped(anomalies(r) as f64))
        }),
        ("stale reads", |r| grouped(number(r, "/stale_reads"))),
        ("worst staleness", |r| {
            match number(r, "/worst_staleness_ms") {
                0.0 => "none".to_owned(),
                ms if ms < 1e3 => format!("{ms:.0} ms"),
                ms => format!("{:.1} s", ms / 1e3),
            }
        }),
        ("items that differ from Postgres afterwards", |r| {
            grouped(number(r, "/audit/difference_count"))
        }),
        ("acknowledged writes lost", |r| {
            grouped(number(r, "/audit/lost_writes"))
        }),
        ("reads answered", |r| {
            format!("{:.3} %", number(r, "/availability/reads/percent"))
        }),
        ("writes answered", |r| {
            format!("{:.3} %", number(r, "/availability/writes/percent"))
        }),
        ("reads failed with Postgres in reach", |r| {
            grouped(number(r, "/promises/failed_reads"))
        }),
        ("writes failed with Postgres in reach", |r| {
            grouped(number(r, "/promises/failed_writes"))
        }),
        ("longest write with Postgres in reach", |r| {
            format!("{} ms", grouped(number(r, "/promises/longest_write_ms")))
        }),
        ("reads: p50 / p99 / max", |r| times(r, "reads")),
        ("writes: p50 / p99 / max", |r| times(r, "writes")),
        ("reads of one item answered from the cache", |r| {
            let reads = r["actions"].as_array().into_iter().flatten();
            let read: f64 = reads
                .filter(|one| one["action"] == "read")
                .map(|one| number(one, "/ok"))
                .sum();
            format!("{:.0} %", number(r, "/cache_hits") * 100.0 / read.max(1.0))
        }),
    ];
    let mut page = String::from("| |");
    for mode in MODES {
        let _ = write!(page, " {mode} |");
    }
    page.push_str("\n|---|---:|---:|---:|\n");
    for (name, cell) in rows {
        let _ = write!(page, "| {name} |");
        for result in results {
            let _ = write!(page, " {} |", cell(result));
        }
        page.push('\n');
    }
    let kinds = results
        .last()
        .map_or(0, |result| count(result, "/fault_kinds"));
    let _ = write!(
        page,
        "\nThree nodes, 16 client processes, {} min in each mode; {kinds} kinds of fault, the same \
         schedule for all three. \"With Postgres in reach\": the node was up, and Postgres could be reached \
         from it.\n\nTo repeat it: `cargo xtask torture --minutes {} --seed {}`, which runs\n\n```\n",
        options.minutes, options.minutes, options.seed
    );
    for mode in MODES {
        let _ = writeln!(page, "writethrough {}", options.check(mode).join(" "));
    }
    page.push_str("```\n");
    page
}

fn times(result: &Value, class: &str) -> String {
    let time = |name: &str| number(result, &format!("/availability/{class}/{name}"));
    format!(
        "{:.1} / {:.1} / {} ms",
        time("p50_ms"),
        time("p99_ms"),
        grouped(time("max_ms"))
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn result(verdict: &str, anomalies: u64, broken: &[&str]) -> Value {
        json!({
            "verdict": verdict, "operations": 1_234_567, "faults": [{}, {}],
            "anomalies": [{"kind": "stale-read", "count": anomalies}],
            "worst_staleness_ms": 2500.0, "promises_broken": broken, "cache_hits": 40,
            "actions": [{"action": "read", "ok": 80}],
            "availability": {"reads": {"percent": 99.5, "p50_ms": 0.4, "p99_ms": 9.0, "max_ms": 1200.0}},
        })
    }

    fn good() -> [Value; 3] {
        [
            result("anomaly", 7, &["not promised"]),
            result("linearizable", 0, &["not promised"]),
            result("linearizable", 0, &[]),
        ]
    }

    #[test]
    fn the_table_has_a_column_for_each_mode_and_the_commands() {
        let options = options(&["--minutes", "3", "--seed", "9"]).unwrap();
        let page = page(&options, &good());
        assert!(
            page.contains("| operations | 1 234 567 | 1 234 567 | 1 234 567 |"),
            "{page}"
        );
        assert!(
            page.contains("| **anomalies** | **7** | **0** | **0** |"),
            "{page}"
        );
        assert!(page.contains("| worst staleness | 2.5 s |"), "{page}");
        assert!(page.contains("0.4 / 9.0 / 1 200 ms"), "{page}");
        assert!(page.contains("| 50 % |"), "{page}");
        assert!(page.contains("--minutes 3 --seed 9") && page.contains("--consistency strict"));
        for line in page.lines().filter(|line| line.starts_with('|')) {
            assert_eq!(line.matches('|').count(), 5, "{line}");
        }
    }

    #[test]
    fn it_fails_unless_strict_and_off_are_clean_and_the_textbook_is_not() {
        assert_eq!(verdict(&good()), Vec::<String>::new());
        let mut weak = good();
        weak[0] = result("linearizable", 0, &[]);
        assert_eq!(verdict(&weak).len(), 1);
        for mode in [1, 2] {
            let mut bad = good();
            bad[mode] = result("anomaly", 1, &[]);
            assert_eq!(verdict(&bad).len(), 1);
        }
        let mut broken = good();
        broken[2] = result("linearizable", 0, &["2 reads failed"]);
        assert_eq!(verdict(&broken), ["2 reads failed"]);
    }

    fn options(words: &[&str]) -> anyhow::Result<Options> {
        let words = words.iter().map(Into::into).collect();
        Options::parse(Arguments::from_vec(words))
    }

    #[test]
    fn options_are_understood_or_refused() {
        assert_eq!(
            options(&["--out", "x.md"]).unwrap().out,
            Some("x.md".into())
        );
        for wrong in [&["--minutes"][..], &["--minutes", "0"], &["--minute", "1"]] {
            assert!(options(wrong).is_err(), "{wrong:?}");
        }
    }
}

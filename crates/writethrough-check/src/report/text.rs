//! The report for a terminal.

use std::fmt::{self, Write};

use super::availability::percent;
use super::faults::UnderFaults;
use super::summary::{Bucket, Summary, Verdict};
use crate::history::{Action, Outcome};
use crate::judge::Role;
use crate::time::duration;

/// Writes the summary as plain text that ends in a new line.
#[must_use]
pub fn text(summary: &Summary) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(summary, &mut out);
    out
}

fn write(summary: &Summary, out: &mut String) -> fmt::Result {
    match summary.verdict {
        Verdict::Linearizable => writeln!(
            out,
            "linearizable: {} operations on {} items, no anomaly",
            summary.operations, summary.items
        )?,
        Verdict::Anomaly => {
            let total: u64 = summary.anomalies.iter().map(|kind| kind.count).sum();
            let audit = summary
                .under_faults
                .as_ref()
                .and_then(|faults| faults.audit.as_ref());
            if let Some(audit) = audit.filter(|audit| !audit.agrees()) {
                writeln!(
                    out,
                    "the audit found {} differences",
                    audit.difference_count
                )?;
            }
            writeln!(
                out,
                "NOT linearizable: {} on {} of {} items, in {} operations",
                anomalies(total),
                summary.bad_items,
                summary.items,
                summary.operations
            )?;
        }
        Verdict::Undecided => writeln!(
            out,
            "could not judge: {}",
            summary.reason.as_deref().unwrap_or("nothing is known")
        )?,
    }
    let seed = summary
        .seed
        .map(|seed| format!("seed {seed}, "))
        .unwrap_or_default();
    writeln!(
        out,
        "  {seed}run of {:.1} s, {} values read, {} unknown outcomes, judged in {:.2} s",
        summary.run_s, summary.reads, summary.unknown, summary.judged_s
    )?;
    if let Some(held_up) = summary.held_up {
        writeln!(
            out,
            "  the judge itself was held up for {} at most, at {:.1} s",
            duration(held_up.length),
            held_up.from as f64 / 1e9
        )?;
    }

    if !summary.actions.is_empty() {
        writeln!(
            out,
            "\n  {:<9}{:>9}{:>9}{:>8}{:>9}{:>8}{:>11}{:>11}{:>11}",
            "operation",
            "invoked",
            "ok",
            "absent",
            "unknown",
            "failed",
            "p50 ms",
            "p99 ms",
            "max ms"
        )?;
        for action in &summary.actions {
            writeln!(
                out,
                "  {:<9}{:>9}{:>9}{:>8}{:>9}{:>8}{:>11.2}{:>11.2}{:>11.2}",
                action.action.name(),
                action.invoked,
                action.ok,
                action.absent,
                action.unknown,
                action.failed,
                action.p50_ms,
                action.p99_ms,
                action.max_ms
            )?;
        }
        let availability = &summary.availability;
        writeln!(
            out,
            "  reads answered {:.4} %, longest stall {:.1} ms; writes answered {:.4} %, longest stall {:.1} ms",
            availability.reads.percent,
            availability.reads.longest_stall_ms,
            availability.writes.percent,
            availability.writes.longest_stall_ms
        )?;
    }
    if let Some(faults) = &summary.under_faults {
        under_faults(faults, out)?;
    }
    if summary.verdict != Verdict::Anomaly {
        return Ok(());
    }

    writeln!(out)?;
    for kind in &summary.anomalies {
        writeln!(out, "  {:<26}{:>9}", kind.kind.name(), kind.count)?;
    }
    if summary.stale_reads > 0 {
        writeln!(
            out,
            "\n  {} stale reads, the worst {} after the newer state had been acknowledged",
            summary.stale_reads,
            duration((summary.worst_staleness_ms * 1e6) as i64)
        )?;
        let most = summary
            .staleness
            .iter()
            .map(|bucket| bucket.reads)
            .max()
            .unwrap_or(1)
            .max(1);
        let used = |bucket: &&Bucket| bucket.reads > 0;
        for bucket in summary.staleness.iter().filter(used) {
            let name = bucket.name();
            let bar = "#".repeat((bucket.reads * 40).div_ceil(most) as usize);
            writeln!(out, "  {name:>14} {:>9} {bar}", bucket.reads)?;
        }
    }
    for (number, anomaly) in (1..).zip(&summary.explained) {
        writeln!(out, "\n{number}. {} of item {}", anomaly.kind, anomaly.key)?;
        writeln!(out, "   {}", anomaly.explanation)?;
        let origin = anomaly
            .operations
            .iter()
            .map(|member| member.start_ns)
            .min()
            .unwrap_or(0);
        for member in &anomaly.operations {
            let mark = match member.role {
                Role::Offender => '!',
                _ if member.needed => '*',
                _ => ' ',
            };
            let value = member
                .value
                .as_ref()
                .map_or("absent".to_owned(), |value| format!("{value:?}"));
            let what = match member.op {
                Action::Delete => "delete".to_owned(),
                op => format!("{} {value}", op.name()),
            };
            let version = member
                .version
                .map(|version| format!(" v{version}"))
                .unwrap_or_default();
            let end = match member.outcome {
                Outcome::Unknown => "unknown".to_owned(),
                _ => duration(member.end_ns.saturating_sub(origin)),
            };
            let process = format!("process {}", member.process);
            writeln!(
                out,
                "   {mark} {:>9} .. {end:<9} {process:<11} target {} {what}{version}",
                duration(member.start_ns.saturating_sub(origin)),
                member.target,
            )?;
        }
    }
    let told = summary.explained.len() as u64;
    let total: u64 = summary.anomalies.iter().map(|kind| kind.count).sum();
    if told < total {
        writeln!(out, "\n{} more are counted but not explained", total - told)?;
    }
    Ok(())
}

fn under_faults(faults: &UnderFaults, out: &mut String) -> fmt::Result {
    writeln!(
        out,
        "\n  {} nodes, consistency {}, schedule seed {}: {} faults; {} reads from the cache",
        faults.nodes,
        faults.consistency,
        faults.schedule_seed,
        faults.faults.len(),
        faults.cache_hits
    )?;
    if !faults.fault_kinds.is_empty() {
        writeln!(
            out,
            "\n  {:<27}{:>6}{:>10}{:>10}{:>8}{:>8}{:>10}{:>10}",
            "under", "times", "reads %", "writes %", "failed", "failed", "longest", "longest"
        )?;
        writeln!(
            out,
            "  {:<27}{:>6}{:>10}{:>10}{:>8}{:>8}{:>10}{:>10}",
            "", "", "answered", "answered", "reads", "writes", "read ms", "write ms"
        )?;
    }
    for kind in &faults.fault_kinds {
        writeln!(
            out,
            "  {:<27}{:>6}{:>10.2}{:>10.2}{:>8}{:>8}{:>10.0}{:>10.0}",
            kind.fault,
            kind.count,
            percent(kind.reads_answered, kind.reads, 2),
            percent(kind.writes_answered, kind.writes, 2),
            kind.failed_reads,
            kind.failed_writes,
            kind.longest_read_ms,
            kind.longest_write_ms
        )?;
    }
    if !faults.fault_kinds.is_empty() {
        writeln!(
            out,
            "  (failed and longest: only where the node was up and could reach Postgres)"
        )?;
    }
    match &faults.audit {
        Some(audit) if audit.agrees() => writeln!(
            out,
            "\n  audit: {} items through {} nodes agree with Postgres, {} acknowledged writes are there or superseded",
            audit.items, faults.nodes, audit.acknowledged_writes
        )?,
        Some(audit) => {
            writeln!(
                out,
                "\n  audit: {} differences on {} items, {} acknowledged writes lost",
                audit.difference_count, audit.items, audit.lost_writes
            )?;
            for one in &audit.differences {
                let node = one
                    .node
                    .map_or("Postgres".to_owned(), |node| format!("node {node}"));
                writeln!(
                    out,
                    "    item {}, {node}: {}; expected {}",
                    one.key, one.found, one.expected
                )?;
            }
        }
        None => writeln!(out, "\n  audit: not done")?,
    }
    let promises = &faults.promises;
    writeln!(
        out,
        "  owed: {} reads, {} failed; {} writes, {} failed, the longest {:.0} ms; {} acknowledged writes lost",
        promises.owed.reads.invoked,
        promises.failed_reads,
        promises.owed.writes.invoked,
        promises.failed_writes,
        promises.longest_write_ms,
        promises.lost_writes
    )?;
    if !faults.promises_broken.is_empty() {
        let whose = if faults.promised {
            "PROMISES BROKEN"
        } else {
            "not kept, and not promised in this mode"
        };
        writeln!(out, "  {whose}:")?;
        for one in &faults.promises_broken {
            writeln!(out, "    {one}")?;
        }
    }
    for error in &faults.errors {
        writeln!(out, "  the nemesis failed: {error}")?;
    }
    Ok(())
}

/// Counts in words: "1 anomaly", "2 anomalies".
fn anomalies(count: u64) -> String {
    if count == 1 {
        "1 anomaly".to_owned()
    } else {
        format!("{count} anomalies")
    }
}

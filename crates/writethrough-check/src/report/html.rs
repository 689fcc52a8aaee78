//! The report as one page: no scripts, no requests, readable in light and in dark.

use std::collections::BTreeSet;
use std::fmt::{self, Write};

use super::summary::{Bucket, Summary, Verdict};
use crate::history::{Action, History, Operation, Outcome};
use crate::judge::{Anomaly, Findings, Role};
use crate::time::duration;

/// Operations of the same item that are drawn around an anomaly, at most.
const CONTEXT: usize = 24;

const STYLE: &str = "
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#667;--line:#d8dde3;--old:#b26a00;--new:#1668b8;--bad:#c62828;--ok:#2e7d32;--bar:#c3cad2}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e4e7ea;--dim:#98a2ad;--line:#333a41;--old:#f0a94a;--new:#6db3f2;--bad:#ff6b6b;--ok:#7bc67e;--bar:#454d56}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}h3{font-size:1rem;margin:1.6rem 0 .2rem}
.dim{color:var(--dim)}.linearizable{color:var(--ok)}.anomaly{color:var(--bad)}code{font-size:.9em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.15rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:0}.scroll{overflow-x:auto}
figure{margin:.6rem 0;overflow-x:auto}svg{display:block;font:11px system-ui,sans-serif}svg text{fill:var(--fg)}svg .dim{fill:var(--dim)}
.grid{stroke:var(--line)}.fault{fill:var(--bad);opacity:.1}.o{fill:var(--bar)}.older{fill:var(--old)}.newer{fill:var(--new)}.offender{fill:var(--bad)}.unneeded{opacity:.55}
.key span{display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 1em;vertical-align:-.05em;border-radius:2px}
";

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

/// Writes the whole report as an HTML page that needs nothing but itself.
#[must_use]
pub fn page(summary: &Summary, history: &History, findings: Option<&Findings>) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(summary, history, findings, &mut out);
    out
}

fn write(
    summary: &Summary,
    history: &History,
    findings: Option<&Findings>,
    out: &mut String,
) -> fmt::Result {
    let (class, title) = match summary.verdict {
        Verdict::Linearizable => ("linearizable", "Linearizable".to_owned()),
        Verdict::Anomaly => ("anomaly", "Not linearizable".to_owned()),
        Verdict::Undecided => (
            "dim",
            format!(
                "Could not judge: {}",
                summary.reason.as_deref().unwrap_or("nothing is known")
            ),
        ),
    };
    write!(
        out,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{0} - consistency report</title><style>{STYLE}</style>\
         <h1 class={class}>{0}</h1><p class=dim>{1} operations on {2} items in {3:.1} s, {4} values read, \
         {5} unknown outcomes; judged in {6:.2} s",
        escape(&title),
        summary.operations,
        summary.items,
        summary.run_s,
        summary.reads,
        summary.unknown,
        summary.judged_s
    )?;
    if let Some(held_up) = summary.held_up {
        let length = duration(held_up.length);
        write!(out, "; the judge itself was held up for {length} at most")?;
    }
    if let Some(seed) = summary.seed {
        write!(out, "; seed {seed}")?;
    }
    for target in &summary.targets {
        write!(out, "; <code>{}</code>", escape(target))?;
    }
    out.push_str("</p>");

    if !summary.anomalies.is_empty() {
        write!(out, "<h2>Anomalies</h2><table><tr><th>kind<th>count</tr>")?;
        for kind in &summary.anomalies {
            write!(out, "<tr><td>{}<td>{}</tr>", kind.kind, kind.count)?;
        }
        out.push_str("</table>");
    }
    if summary.stale_reads > 0 {
        write!(
            out,
            "<h2>Staleness</h2><p>{} reads returned a state whose replacement had been acknowledged before they \
             began; the worst began {} after.</p>",
            summary.stale_reads,
            duration((summary.worst_staleness_ms * 1e6) as i64)
        )?;
        histogram(&summary.staleness, out)?;
    }
    service(summary, out)?;
    faults(summary, out)?;

    if let Some(findings) = findings.filter(|findings| !findings.anomalies.is_empty()) {
        out.push_str(
            "<h2>The worst of each kind</h2><p class=key><span style=\"background:var(--old);margin-left:0\"></span>older state\
             <span style=\"background:var(--new)\"></span>newer state<span style=\"background:var(--bad)\"></span>offending operation\
             <span style=\"background:var(--bar)\"></span>other operations on the item\
             <span style=\"background:var(--bad);opacity:.2\"></span>a fault in force</p><p class=dim>Each bar is one operation \
             from invocation to completion. Full colour marks the smallest set of operations that is already impossible. \
             Long stretches of time are shortened: read the labels, not the widths.</p>",
        );
        for (number, anomaly) in (1..).zip(&findings.anomalies) {
            write!(
                out,
                "<h3>{number}. {}</h3><p class=dim>item <code>{}</code></p><p>{}</p>",
                anomaly.kind,
                escape(history.key_name(anomaly.key)),
                escape(&anomaly.explanation)
            )?;
            timeline(history, anomaly, out)?;
        }
    }
    out.push_str("</html>\n");
    Ok(())
}

fn service(summary: &Summary, out: &mut String) -> fmt::Result {
    if summary.actions.is_empty() {
        return Ok(());
    }
    out.push_str(
        "<h2>Service</h2><div class=scroll><table><tr><th>operation<th>invoked<th>ok<th>absent<th>unknown<th>failed\
         <th>p50 ms<th>p99 ms<th>max ms</tr>",
    );
    for action in &summary.actions {
        write!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{:.2}<td>{:.2}<td>{:.2}</tr>",
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
    write!(
        out,
        "</table></div><p>Reads answered: {:.4} %, longest stall {:.1} ms. Writes answered: {:.4} %, longest stall {:.1} ms.</p>",
        availability.reads.percent,
        availability.reads.longest_stall_ms,
        availability.writes.percent,
        availability.writes.longest_stall_ms
    )
}

fn faults(summary: &Summary, out: &mut String) -> fmt::Result {
    let Some(under) = &summary.under_faults else {
        return Ok(());
    };
    write!(
        out,
        "<h2>Faults</h2><p>{} nodes, consistency {}, schedule seed {}; {} reads were answered from the cache.</p>",
        under.nodes,
        escape(&under.consistency),
        under.schedule_seed,
        under.cache_hits
    )?;
    if !under.faults.is_empty() {
        out.push_str(
            "<div class=scroll><table><tr><th>under<th>from s<th>to s<th>reads answered %<th>writes answered %\
             <th>failed reads<th>failed writes<th>longest write ms</tr>",
        );
        for fault in &under.faults {
            let target = fault.target.map_or(String::new(), |at| format!(" {at}"));
            let owed = &fault.owed;
            write!(
                out,
                "<tr><td>{}{target}<td>{:.3}<td>{:.3}<td>{:.2}<td>{:.2}<td>{}<td>{}<td>{:.0}</tr>",
                escape(&fault.fault),
                fault.from_s,
                fault.to_s,
                fault.availability.reads.percent,
                fault.availability.writes.percent,
                owed.reads.invoked - owed.reads.answered,
                owed.writes.invoked - owed.writes.answered,
                owed.writes.longest_stall_ms
            )?;
        }
        out.push_str(
            "</table></div><p class=dim>Failed and longest: only where the node was up and could reach Postgres.</p>",
        );
    }
    if let Some(audit) = &under.audit {
        write!(
            out,
            "<p>Audit: {} items through {} nodes, {} differences; {} acknowledged writes, {} lost.</p>",
            audit.items,
            under.nodes,
            audit.difference_count,
            audit.acknowledged_writes,
            audit.lost_writes
        )?;
    }
    if !under.promises_broken.is_empty() {
        let title = if under.promised {
            "Promises broken"
        } else {
            "Not kept, and not promised in this mode"
        };
        write!(out, "<p class=anomaly>{title}</p><ul>")?;
        for one in &under.promises_broken {
            write!(out, "<li>{}", escape(one))?;
        }
        out.push_str("</ul>");
    }
    Ok(())
}

fn histogram(buckets: &[Bucket], out: &mut String) -> fmt::Result {
    let first = buckets
        .iter()
        .position(|bucket| bucket.reads > 0)
        .unwrap_or(0);
    let last = buckets
        .iter()
        .rposition(|bucket| bucket.reads > 0)
        .unwrap_or(0);
    let shown = &buckets[first..=last];
    let most = shown
        .iter()
        .map(|bucket| bucket.reads)
        .max()
        .unwrap_or(1)
        .max(1);
    let height = shown.len() * 20 + 4;
    write!(
        out,
        "<figure><svg width=640 height={height} role=img aria-label=\"staleness histogram\">"
    )?;
    for (row, bucket) in shown.iter().enumerate() {
        let y = row * 20 + 2;
        let width = (bucket.reads as f64 / most as f64 * 420.0).max(if bucket.reads > 0 {
            1.0
        } else {
            0.0
        });
        let name = bucket.name();
        write!(
            out,
            "<text x=105 y={0} text-anchor=end>{name}</text><rect x=112 y={y} width={width:.1} height=15 class=offender />\
             <text x={1:.1} y={0} class=dim>{2}</text>",
            y + 12,
            width + 118.0,
            bucket.reads
        )?;
    }
    out.push_str("</svg></figure>");
    Ok(())
}

/// Formats a time before or after the left edge of a timeline.
fn signed(ns: i64) -> String {
    if ns < 0 {
        format!("-{}", duration(ns.saturating_neg()))
    } else {
        duration(ns)
    }
}

/// One bar of a timeline.
struct Bar<'a> {
    operation: &'a Operation,
    class: &'static str,
    label: String,
    member: bool,
}

fn timeline(history: &History, anomaly: &Anomaly, out: &mut String) -> fmt::Result {
    let operations = history.operations();
    let mut bars: Vec<Bar<'_>> = Vec::new();
    for member in &anomaly.members {
        let operation = &operations[member.operation];
        let value = member
            .value
            .map_or("absent", |value| history.value_name(value));
        let class = match (member.role, member.needed) {
            (Role::Offender, _) => "offender",
            (Role::Older, true) => "older",
            (Role::Older, false) => "older unneeded",
            (Role::Newer, true) => "newer",
            (Role::Newer, false) => "newer unneeded",
        };
        let label = match operation.action {
            Action::Delete => "delete".to_owned(),
            action => format!("{} {value}", action.name()),
        };
        bars.push(Bar {
            operation,
            class,
            label,
            member: true,
        });
    }
    let Some(from) = bars.iter().map(|bar| bar.operation.start).min() else {
        return Ok(());
    };
    let to = bars
        .iter()
        .map(|bar| bar.operation.end)
        .max()
        .unwrap_or(from);

    // Other operations on the item, those nearest to the offender first.
    let is_member = |at: usize| anomaly.members.iter().any(|member| member.operation == at);
    let centre = anomaly
        .members
        .iter()
        .find(|member| member.role == Role::Offender)
        .map_or(to, |member| operations[member.operation].start);
    let mut context: Vec<&Operation> = operations
        .iter()
        .enumerate()
        .filter(|(at, operation)| {
            operation.key == Some(anomaly.key)
                && operation.start <= to
                && operation.end >= from
                && !is_member(*at)
        })
        .map(|(_, operation)| operation)
        .collect();
    context.sort_by_key(|operation| operation.start.abs_diff(centre));
    context.truncate(CONTEXT);
    for operation in context {
        let value = operation
            .value
            .map_or("", |value| history.value_name(value));
        let label = format!("{} {value}", operation.action.name());
        bars.push(Bar {
            operation,
            class: "o",
            label,
            member: false,
        });
    }

    // Every stretch between two edges of member bars gets room by the root of its length, with a
    // least width.
    let edges: BTreeSet<i64> = bars
        .iter()
        .filter(|bar| bar.member)
        .flat_map(|bar| [bar.operation.start, bar.operation.end])
        .collect();
    let edges: Vec<i64> = edges.into_iter().collect();
    let weights: Vec<f64> = edges
        .windows(2)
        .map(|pair| ((pair[1].saturating_sub(pair[0])) as f64).sqrt())
        .collect();
    let whole: f64 = weights.iter().sum::<f64>().max(1.0);
    let least = 0.5 / weights.len().max(1) as f64;
    let weights: Vec<f64> = weights
        .iter()
        .map(|weight| (weight / whole).max(least))
        .collect();
    let whole: f64 = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let (left, width) = (92.0, 760.0);
    let mut places = vec![left];
    for weight in &weights {
        places.push(places[places.len() - 1] + weight / whole * width);
    }
    let place = |at: i64| -> f64 {
        let after = edges.partition_point(|&edge| edge <= at);
        if after == 0 {
            return left;
        }
        let Some(&next) = edges.get(after) else {
            return left + width;
        };
        let (edge, x) = (edges[after - 1], places[after - 1]);
        x + at.saturating_sub(edge) as f64 / next.saturating_sub(edge) as f64 * (places[after] - x)
    };

    let mut processes: Vec<u32> = bars.iter().map(|bar| bar.operation.process).collect();
    processes.sort_unstable_by_key(|process| {
        let member = bars
            .iter()
            .any(|bar| bar.member && bar.operation.process == *process);
        (!member, *process)
    });
    processes.dedup();
    let lane = 34;
    let bottom = 30 + processes.len() * lane;
    write!(
        out,
        "<figure><svg width=880 height={} role=img aria-label=\"timeline of the operations\">",
        bottom + 8
    )?;
    for fault in &history.header.faults {
        if fault.from > to || fault.to < from {
            continue;
        }
        let (start, end) = (place(fault.from.max(from)), place(fault.to.min(to)));
        let target = fault.target.map_or(String::new(), |at| format!(" {at}"));
        write!(
            out,
            "<rect x={start:.1} y=20 width={:.1} height={} class=fault><title>{}{target}, {} to {}</title></rect>",
            (end - start).max(2.0),
            bottom - 20,
            escape(&fault.fault),
            signed(fault.from.saturating_sub(from)),
            signed(fault.to.saturating_sub(from))
        )?;
    }
    let mut label_free = f64::MIN;
    for (&edge, &x) in edges.iter().zip(&places) {
        write!(
            out,
            "<line x1={x:.1} x2={x:.1} y1=20 y2={bottom} class=grid />"
        )?;
        if x >= label_free {
            write!(
                out,
                "<text x={x:.1} y=12 text-anchor=middle class=dim>{}</text>",
                duration(edge.saturating_sub(from))
            )?;
            label_free = x + 56.0;
        }
    }
    for (row, &process) in processes.iter().enumerate() {
        let y = 24 + row * lane;
        write!(
            out,
            "<text x=0 y={} class=dim>process {process}</text>",
            y + 22
        )?;
        let mut mine: Vec<&Bar<'_>> = bars
            .iter()
            .filter(|bar| bar.operation.process == process)
            .collect();
        mine.sort_by_key(|bar| (bar.member, bar.operation.start));
        for bar in mine {
            let operation = bar.operation;
            let start = place(operation.start);
            let unknown = operation.outcome == Outcome::Unknown;
            let end = if unknown {
                left + width + 20.0
            } else {
                place(operation.end)
            };
            let version = operation
                .version
                .map(|version| format!(", version {version}"))
                .unwrap_or_default();
            let outcome = match operation.outcome {
                Outcome::Ok => "",
                Outcome::Absent => ", absent",
                Outcome::Unknown => ", outcome unknown",
                Outcome::Failed => ", failed",
            };
            write!(
                out,
                "<g class=\"{}\"><title>process {process}: {}{version}{outcome}, target {}, {} to {}</title>\
                 <rect x={start:.1} y={} width={:.1} height=12 rx=2{} />",
                bar.class,
                escape(&bar.label),
                operation.target,
                duration(operation.start.saturating_sub(from)),
                duration(operation.end.saturating_sub(from)),
                y + 13,
                (end - start).max(3.0),
                if unknown { " fill-opacity=.45" } else { "" },
            )?;
            if bar.member {
                let anchor = if start > left + width * 0.75 {
                    "end"
                } else {
                    "start"
                };
                let x = if anchor == "end" { end } else { start };
                write!(
                    out,
                    "<text x={x:.1} y={} text-anchor={anchor}>{}</text>",
                    y + 10,
                    escape(&bar.label)
                )?;
            }
            out.push_str("</g>");
        }
    }
    out.push_str("</svg></figure>");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{FaultWindow, Header, Record, record};
    use crate::judge::Judge;
    use crate::report::{Circumstances, under_faults};

    const TAG: &str = "<script>&\"";

    /// Ids, values and addresses come from the service and from files. None of them may become
    /// markup, wherever on the page it stands.
    #[test]
    fn no_text_of_a_history_becomes_markup() {
        let fault = |target, from| FaultWindow {
            fault: TAG.to_owned(),
            target,
            from,
            to: 9,
            ..FaultWindow::default()
        };
        let mut history = History::new(Header {
            targets: vec![TAG.to_owned()],
            faults: vec![fault(None, 0), fault(Some(0), 3)],
            note: Some(TAG.to_owned()),
            ..Header::default()
        });
        let named = |action, value: u32, start| {
            let shown = format!("{TAG}{value}");
            Record {
                key: Some(TAG.into()),
                value: Some(shown.into()),
                ..record(0, action, None, start, start + 1, Outcome::Ok)
            }
        };
        for made in [
            named(Action::Create, 1, 0),
            named(Action::Update, 2, 2),
            named(Action::Read, 1, 4),
            named(Action::Read, 3, 6),
        ] {
            history.push(&made).unwrap();
        }
        let failed = record(1, Action::Read, None, 5, 6, Outcome::Failed);
        history.push(&failed).unwrap();
        let judged = Judge::default().judge(&history);
        let circumstances = Circumstances {
            consistency: TAG.to_owned(),
            ..Circumstances::default()
        };
        let summary =
            Summary::new(&history, &judged).with_faults(under_faults(&history, circumstances));
        let written = page(&summary, &history, judged.as_ref().ok());
        assert!(written.contains("lt;script&gt;&amp;&quot;"));
        assert!(!written.contains("<script"), "{written}");

        let refused = Err(crate::judge::JudgeError::ValueWrittenTwice {
            value: TAG.to_owned(),
        });
        let written = page(&Summary::new(&history, &refused), &history, None);
        assert!(!written.contains("<script"), "{written}");
    }
}

//! How long a million recorded operations take to be read and judged, and how much memory:
//! `cargo run --release -p writethrough-check --example judge_million -- [OPERATIONS] [STALE-READS-PER-MILLE]`.
//!
//! The history is that of a simulated service with 16 processes, lists, unknown outcomes, items
//! that come and go, and, if asked for, stale reads.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::time::{Duration, Instant};

use writethrough_check::history::{Action, Header, History, Outcome, Record, RecordedItem};
use writethrough_check::judge::Judge;
use writethrough_check::report::{Summary, text};

const PROCESSES: u32 = 16;
const ITEMS: usize = 24;

#[derive(Clone)]
struct Item {
    key: String,
    value: String,
    before: String,
    version: u64,
    created: i64,
}

fn simulate(count: usize, stale_per_mille: u64) -> History {
    let mut random = fastrand::Rng::with_seed(1);
    let mut history = History::new(Header {
        seed: Some(1),
        ..Header::default()
    });
    let mut living: VecDeque<Item> = VecDeque::new();
    let mut graves: VecDeque<String> = VecDeque::new();
    let mut made = 0;
    // (moment of effect, start, end, process)
    let mut next: BinaryHeap<Reverse<(i64, i64, i64, u32)>> = BinaryHeap::new();
    let schedule = |after: i64, process: u32, random: &mut fastrand::Rng| {
        let start = after + random.i64(1_000..50_000);
        let effect = start + random.i64(50_000..1_500_000);
        Reverse((
            effect,
            start,
            effect + random.i64(50_000..1_500_000),
            process,
        ))
    };
    for process in 0..PROCESSES {
        next.push(schedule(0, process, &mut random));
    }
    for number in 0..count {
        let Some(Reverse((effect, start, end, process))) = next.pop() else {
            break;
        };
        let lost = random.u16(0..200) == 0;
        let mut record = Record {
            process,
            action: Action::Read,
            key: None,
            value: None,
            version: None,
            created: None,
            start,
            end,
            outcome: Outcome::Ok,
            status: 200,
            target: 0,
            window: None,
            items: Vec::new(),
        };
        let hot = (random.f64().powi(2) * living.len() as f64) as usize;
        let dice = random.u8(0..100);
        if living.len() < ITEMS / 2 || (dice < 4 && living.len() < ITEMS) {
            made += 1;
            let item = Item {
                key: format!("00000000-0000-7000-8000-{made:012}"),
                value: format!("value-{process}-{number}"),
                before: format!("value-{process}-{number}"),
                version: 1,
                created: effect,
            };
            record.action = Action::Create;
            record.value = Some(item.value.clone().into());
            if lost {
                record.outcome = Outcome::Unknown;
            } else {
                record.key = Some(item.key.clone().into());
                (record.version, record.created) = (Some(1), Some(effect));
            }
            living.push_front(item);
        } else if dice < 8 && living.len() > ITEMS / 2 {
            let item = living.remove(random.usize(..living.len()));
            record.action = Action::Delete;
            if let Some(item) = item {
                record.key = Some(item.key.clone().into());
                graves.push_back(item.key);
                if graves.len() > ITEMS {
                    graves.pop_front();
                }
            }
            if lost {
                record.outcome = Outcome::Unknown;
            }
        } else if dice < 30 {
            let item = &mut living[hot];
            record.action = Action::Update;
            record.key = Some(item.key.clone().into());
            let value = format!("value-{process}-{number}");
            record.value = Some(value.clone().into());
            if lost {
                record.outcome = Outcome::Unknown;
            }
            if !lost || random.bool() {
                item.before = std::mem::replace(&mut item.value, value);
                item.version += 1;
            }
            if !lost {
                record.version = Some(item.version);
            }
        } else if dice < 40 {
            record.action = Action::List;
            let page: Vec<&Item> = living.iter().take(10).collect();
            let more = living.len() > page.len();
            record.window = Some((None, page.last().filter(|_| more).map(|item| item.created)));
            record.items = page
                .into_iter()
                .map(|item| RecordedItem {
                    key: item.key.clone().into(),
                    value: item.value.clone().into(),
                    version: Some(item.version),
                    created: Some(item.created),
                })
                .collect();
        } else if dice < 44 && !graves.is_empty() {
            record.key = Some(graves[random.usize(..graves.len())].clone().into());
            record.outcome = Outcome::Absent;
        } else {
            let item = &living[hot];
            record.key = Some(item.key.clone().into());
            let stale = random.u64(0..1000) < stale_per_mille && item.version > 1;
            record.value = Some(
                if stale { &item.before } else { &item.value }
                    .clone()
                    .into(),
            );
            record.version = Some(item.version).filter(|_| !stale);
        }
        if let Err(error) = history.push(&record) {
            panic!("the simulation made a wrong record: {error}");
        }
        let after = if record.outcome == Outcome::Unknown {
            end + 10_000_000
        } else {
            end
        };
        next.push(schedule(after, process, &mut random));
    }
    history
}

fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|peak| peak.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

#[allow(clippy::print_stdout, reason = "an example reports to its user")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let count = arguments
        .next()
        .map_or(Ok(1_000_000), |count| count.parse())?;
    let stale_per_mille = arguments.next().map_or(Ok(0), |stale| stale.parse())?;

    let file = tempfile::NamedTempFile::new()?;
    let simulated = simulate(count, stale_per_mille);
    simulated.write(BufWriter::with_capacity(
        1 << 20,
        File::create(file.path())?,
    ))?;
    drop(simulated);
    println!(
        "{count} operations, {} MiB of JSON lines",
        file.path().metadata()?.len() >> 20
    );

    let begun = Instant::now();
    let history = History::read(BufReader::with_capacity(1 << 20, File::open(file.path())?))?;
    println!("read in {:.2} s", begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    let judged = Judge::new(3, Duration::from_secs(60)).judge(&history);
    println!("judged in {:.2} s", begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    let summary = Summary::new(&history, &judged);
    println!("summed up in {:.2} s", begun.elapsed().as_secs_f64());
    println!(
        "peak memory {} MiB\n\n{}",
        peak_memory_mib(),
        text(&summary)
    );
    Ok(())
}

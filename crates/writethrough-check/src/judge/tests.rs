//! Fixtures, mutants of the judge, and the comparison of the fast test with two general ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use porcupine_rs::{CheckResult, Model, Operation as PorcupineOperation};
use proptest::prelude::*;

use super::Judge;
use super::anomaly::Kind;
use super::findings::{Findings, JudgeError};
use super::rules::Rules;
use super::search::{Answer, Call, Event, search};
use crate::history::{Action, Header, History, Outcome, Record, Value, record};

fn fixtures() -> BTreeMap<String, History> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/histories");
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let text = fs::read(&path).unwrap();
            let history =
                History::read(&text[..]).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, history)
        })
        .collect()
}

fn kinds(result: &Result<Findings, JudgeError>) -> Result<Vec<Kind>, JudgeError> {
    result
        .as_ref()
        .map(|findings| findings.counts.keys().copied().collect())
        .map_err(Clone::clone)
}

#[test]
fn every_fixture_is_judged_as_it_says() {
    let mut seen = std::collections::BTreeSet::new();
    let mut wrong = Vec::new();
    for (name, history) in fixtures() {
        let expected = history.header.expect.clone().unwrap();
        assert_eq!(name.starts_with("good"), expected.is_empty(), "{name}");
        let found = kinds(&Judge::default().judge(&history));
        let names: Vec<&str> = found.iter().flatten().map(|kind| kind.name()).collect();
        if found.is_err() || names.join(" ") != expected {
            wrong.push(format!("{name}: {found:?}"));
        }
        seen.extend(found.into_iter().flatten());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // `Disorder` is what is left when none of the others fits; no history is known that ends there.
    assert_eq!(seen.len(), 16, "a kind of anomaly has no fixture: {seen:?}");
}

#[test]
fn explanations_are_small_and_name_an_offender() {
    for (name, history) in fixtures() {
        for anomaly in Judge::default().judge(&history).unwrap().anomalies {
            let needed = anomaly
                .members
                .iter()
                .filter(|member| member.needed)
                .count();
            assert!((1..=5).contains(&needed), "{name}: {anomaly:#?}");
            assert!(anomaly.members.len() <= 6, "{name}: {anomaly:#?}");
            assert!(
                anomaly.explanation.ends_with('.'),
                "{name}: {}",
                anomaly.explanation
            );
        }
    }
}

/// Each rule is needed: without it, at least the named fixture is judged differently.
#[test]
fn without_any_one_rule_the_judge_is_wrong_about_a_fixture() {
    type SwitchOff = fn(&mut Rules);
    let mutants: [(SwitchOff, &str); 16] = [
        (
            |rules| rules.forward_zones_are_apart = false,
            "bad-values-in-turns",
        ),
        (
            |rules| rules.backward_zones_are_outside = false,
            "bad-nested-zones",
        ),
        (
            |rules| rules.life_has_an_order = false,
            "bad-resurrected-item",
        ),
        (|rules| rules.versions_grow = false, "bad-backward-version"),
        (
            |rules| rules.versions_are_unique = false,
            "bad-reused-version",
        ),
        (
            |rules| rules.versions_have_no_gaps = false,
            "bad-skipped-version",
        ),
        (
            |rules| rules.reads_are_evidence = false,
            "bad-non-monotonic-read-of-unknown-write",
        ),
        (
            |rules| rules.acknowledged_writes_took_effect = false,
            "bad-lost-write",
        ),
        (
            |rules| rules.unknown_is = Outcome::Ok,
            "good-unknown-took-effect-later",
        ),
        (
            |rules| rules.unknown_is = Outcome::Failed,
            "good-unknown-took-effect-later",
        ),
        (
            |rules| rules.failed_is = Outcome::Unknown,
            "bad-failed-write-seen",
        ),
        (
            |rules| rules.values_were_written = false,
            "bad-unwritten-value",
        ),
        (
            |rules| rules.values_were_written_before = false,
            "bad-value-from-future",
        ),
        (
            |rules| rules.existing_items_are_found = false,
            "bad-lost-item",
        ),
        (
            |rules| rules.omissions_are_reads = false,
            "bad-list-misses-item",
        ),
        (
            |rules| rules.entries_are_reads = false,
            "bad-list-shows-deleted-item",
        ),
    ];
    let fixtures = fixtures();
    for (switch_off, victim) in mutants {
        let mut rules = Rules::ALL;
        switch_off(&mut rules);
        let right = |judge: &Judge| {
            judge
                .judge(&fixtures[victim])
                .map(|found| found.linearizable())
        };
        assert_eq!(
            right(&Judge::default()),
            Ok(victim.starts_with("good")),
            "{victim}"
        );
        assert_ne!(
            right(&Judge::with_rules(rules)),
            Ok(victim.starts_with("good")),
            "{victim} is judged rightly without a rule: {rules:#?}"
        );
    }
}

#[test]
fn a_value_written_twice_cannot_be_judged() {
    let mut history = History::new(Header::default());
    for process in 0..2 {
        history
            .push(&record(
                process,
                Action::Create,
                Some(0),
                0,
                1,
                Outcome::Unknown,
            ))
            .unwrap();
    }
    assert!(matches!(
        Judge::default().judge(&history),
        Err(JudgeError::ValueWrittenTwice { .. })
    ));
    let nothing = History::new(Header::default());
    assert_eq!(
        Judge::default().judge(&nothing).unwrap_err(),
        JudgeError::Empty
    );
}

/// Two items that had the same value before the history began. Reads of it were taken together: a
/// read of the one item, after an update of the other, made the other's state look stale.
#[test]
fn items_may_begin_with_the_same_value() {
    let read = |process, key: &str, value: &str, start| Record {
        key: Some(key.to_owned().into()),
        value: Some(value.to_owned().into()),
        ..record(process, Action::Read, None, start, start + 1, Outcome::Ok)
    };
    for (first, second) in [("x", "y"), ("y", "x")] {
        let update = |process, key: &'static str, value, start| Record {
            key: Some(key.into()),
            ..record(
                process,
                Action::Update,
                Some(value),
                start,
                start + 1,
                Outcome::Ok,
            )
        };
        let records = [
            read(0, first, "old", 0),
            read(0, second, "old", 2),
            update(0, first, 1, 4),
            read(0, second, "old", 6),
            update(0, second, 2, 8),
        ];
        let found = Judge::default().judge(&history_of(&records)).unwrap();
        assert!(found.linearizable(), "{found:#?}");
        let stale = [&records[..], &[read(0, second, "old", 10)]].concat();
        let found = Judge::default().judge(&history_of(&stale)).unwrap();
        assert_eq!(
            found.counts.keys().copied().collect::<Vec<_>>(),
            [Kind::LostWrite]
        );
    }
}

/// The general test's view of a small history of one item, made without any code of the fast test.
fn events(records: &[Record<'_>]) -> Vec<Event> {
    let value = |record: &Record<'_>| Value(record.value.as_ref().unwrap().parse().unwrap());
    let version_of = |record: &Record<'_>| {
        records
            .iter()
            .filter(|other| other.value == record.value)
            .find_map(|other| other.version)
    };
    // A create that was never answered and never seen could be of any item, so it is of none.
    let seen = |record: &Record<'_>| {
        records
            .iter()
            .any(|other| other.action == Action::Read && other.value == record.value)
    };
    let mut events = Vec::new();
    for record in records {
        if record.key.is_none() && !seen(record) {
            continue;
        }
        let call = match (record.action, record.outcome) {
            (_, Outcome::Failed) => continue,
            (_, Outcome::Absent) => Call::ReadAbsent,
            (Action::Create, _) => Call::Create(value(record), version_of(record)),
            (Action::Update, _) => Call::Update(value(record), version_of(record)),
            (Action::Delete, _) => Call::Delete,
            (Action::Read | Action::List, Outcome::Unknown) => continue,
            (Action::Read | Action::List, Outcome::Ok) => Call::Read(value(record)),
        };
        let optional = record.outcome == Outcome::Unknown;
        let end = if optional { i64::MAX } else { record.end };
        events.push(Event {
            start: record.start,
            end,
            call,
            optional,
        });
    }
    events
}

fn history_of(records: &[Record<'_>]) -> History {
    let mut history = History::new(Header::default());
    for record in records {
        history.push(record).unwrap();
    }
    history
}

/// The same register for the porcupine-rs crate, without versions. An operation that may never
/// happen is one that ends after all others and has no effect where it cannot have any.
#[derive(Clone, Debug)]
struct Item;

impl Model for Item {
    /// 0: not created, 1: value, 2: deleted.
    type State = (u8, u32);
    type Op = Event;
    type Metadata = ();

    fn init() -> Self::State {
        (0, 0)
    }

    fn step(&(life, current): &Self::State, event: &Event) -> (bool, Self::State) {
        let next = match (life, event.call) {
            (0, Call::Create(value, _)) | (1, Call::Update(value, _)) => Some((1, value.0)),
            (1, Call::Delete) => Some((2, 0)),
            (1, Call::Read(value)) if value.0 == current => Some((1, current)),
            (0 | 2, Call::ReadAbsent) => Some((life, current)),
            _ => None,
        };
        match next {
            Some(next) => (true, next),
            None => (event.optional, (life, current)),
        }
    }
}

fn porcupine(events: &[Event]) -> bool {
    let operations: Vec<PorcupineOperation<Item>> = events
        .iter()
        .map(|&event| PorcupineOperation {
            client_id: None,
            call_time: event.start,
            return_time: event.end,
            op: event,
            metadata: None,
        })
        .collect();
    porcupine_rs::check_operations_timeout(&operations, Duration::from_secs(20)) == CheckResult::Ok
}

/// A small history of one item: any reads, any times, often not linearizable.
fn any_history(versioned: bool) -> impl Strategy<Value = Vec<Record<'static>>> {
    let operation = (0..10_u8, 0..6_u32, 0..24_i64, 0..10_i64, 0..10_u8);
    let create = (0..8_i64, 0..4_u8);
    (
        proptest::collection::vec(operation, 1..11),
        any::<u64>(),
        create,
    )
        .prop_map(move |(operations, seed, (created, luck))| {
            let outcome = if luck == 0 {
                Outcome::Unknown
            } else {
                Outcome::Ok
            };
            let mut records = vec![record(0, Action::Create, Some(0), 2, 2 + created, outcome)];
            let mut written = 1;
            let mut deleted = false;
            for (process, (what, which, start, length, luck)) in (1..).zip(operations) {
                let end = start + length;
                let unknown = if luck < 2 {
                    Outcome::Unknown
                } else {
                    Outcome::Ok
                };
                records.push(match what {
                    0..=3 => {
                        written += 1;
                        record(
                            process,
                            Action::Update,
                            Some(written - 1),
                            start,
                            end,
                            unknown,
                        )
                    }
                    4 if !deleted || unknown == Outcome::Unknown => {
                        deleted |= unknown == Outcome::Ok;
                        record(process, Action::Delete, None, start, end, unknown)
                    }
                    4 | 5 => record(process, Action::Read, None, start, end, Outcome::Absent),
                    _ => record(process, Action::Read, Some(which), start, end, Outcome::Ok),
                });
            }
            // Reads of what was never written are a case of its own.
            for record in &mut records {
                if record.action == Action::Read
                    && let Some(value) = &record.value
                {
                    let value: u32 = value.parse().unwrap();
                    record.value = Some((value % written).to_string().into());
                }
            }
            if versioned {
                // One version each, in any order, without asking whether it makes sense.
                let mut versions: Vec<u64> = (1..=u64::from(written)).collect();
                fastrand::Rng::with_seed(seed).shuffle(&mut versions[1..]);
                if seed % 3 == 0 {
                    versions.sort_unstable();
                }
                for record in &mut records {
                    if let (Some(value), true) = (&record.value, record.outcome == Outcome::Ok) {
                        record.version = Some(versions[value.parse::<usize>().unwrap()]);
                    }
                }
            }
            records
        })
}

/// A history that a linearizable register could have produced: every operation takes effect at a
/// moment of its choice.
fn possible_history() -> impl Strategy<Value = Vec<Record<'static>>> {
    (any::<u64>(), 1..80_usize, 1..12_i64).prop_map(|(seed, count, spread)| {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut life, mut current, mut version) = (0, 0, 0_u64);
        let mut records = Vec::new();
        for number in 0..count {
            let moment = number as i64 * 10;
            let start = moment - random.i64(0..spread * 10);
            let end = moment + random.i64(0..spread * 10);
            let process = number as u32;
            let unknown = random.u8(0..6) == 0;
            let outcome = if unknown {
                Outcome::Unknown
            } else {
                Outcome::Ok
            };
            let happens = !unknown || random.bool();
            let new = number as u32;
            let made = match random.u8(0..20) {
                0..=6 if life == 1 => {
                    if happens {
                        (current, version) = (new, version + 1);
                    }
                    let mut made = record(process, Action::Update, Some(new), start, end, outcome);
                    made.version = (!unknown).then_some(version);
                    made
                }
                _ if life == 0 && number > 2 => {
                    (life, current, version) = (1, new, 1);
                    let mut made =
                        record(process, Action::Create, Some(new), start, end, Outcome::Ok);
                    made.version = Some(version);
                    made
                }
                7 if life == 1 && number > 20 => {
                    if happens {
                        life = 2;
                    }
                    record(process, Action::Delete, None, start, end, outcome)
                }
                _ if life == 1 => {
                    let mut made = record(
                        process,
                        Action::Read,
                        Some(current),
                        start,
                        end,
                        Outcome::Ok,
                    );
                    made.version = Some(version);
                    made
                }
                _ => record(process, Action::Read, None, start, end, Outcome::Absent),
            };
            records.push(made);
        }
        records.push(record(
            999,
            Action::Update,
            Some(9999),
            0,
            0,
            Outcome::Failed,
        ));
        records
    })
}

fn differ(records: &[Record<'_>], versions: bool) -> Result<bool, TestCaseError> {
    let history = history_of(records);
    let events = events(records);
    let general = search(&events, Duration::from_secs(20));
    prop_assert_ne!(general, Answer::OutOfTime);
    let general = general == Answer::Linearizable;
    // Its model begins before the creation.
    if !versions
        && events
            .iter()
            .any(|event| matches!(event.call, Call::Create(..)))
    {
        prop_assert_eq!(general, porcupine(&events), "the two general tests differ");
    }
    match Judge::default().judge(&history) {
        // A version that no operation carries is a matter of counting, which the general test does
        // not know.
        Ok(found) => {
            let clean = found
                .counts
                .keys()
                .all(|&kind| kind == Kind::SkippedVersion);
            prop_assert_eq!(clean, general, "{:?}", found);
        }
        Err(JudgeError::Empty) => prop_assert!(general),
        Err(error) => prop_assert!(false, "{}", error),
    }
    Ok(general)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn the_fast_test_agrees_with_the_general_ones(records in any_history(false)) {
        differ(&records, false)?;
    }

    #[test]
    fn the_fast_test_agrees_with_the_general_one_about_versions(records in any_history(true)) {
        differ(&records, true)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn what_a_linearizable_register_did_is_accepted(records in possible_history()) {
        let found = Judge::default().judge(&history_of(&records));
        prop_assert!(found.as_ref().is_ok_and(Findings::linearizable), "{:?}", found);
    }
}

/// Both answers are common among the random histories; otherwise the comparison would say little.
#[test]
fn random_histories_are_of_both_kinds() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    for versioned in [false, true] {
        let mut runner = TestRunner::deterministic();
        let strategy = any_history(versioned);
        let possible = (0..1_000)
            .filter(|_| {
                let records = strategy.new_tree(&mut runner).unwrap().current();
                differ(&records, versioned).unwrap()
            })
            .count();
        assert!(
            (100..900).contains(&possible),
            "{possible} of 1000 are linearizable"
        );
    }
}

/// A collection whose items come and go, read page by page, newest first; every page is one
/// moment's truth.
///
/// Returns the records, and for each page that left out nothing the items which certainly lived all
/// the time it took.
fn possible_collection(seed: u64, count: usize) -> (Vec<Record<'static>>, Vec<Vec<usize>>) {
    struct Item {
        key: String,
        created: i64,
        acknowledged: i64,
        /// When a deletion was first asked for.
        doomed: i64,
        living: bool,
    }
    let mut random = fastrand::Rng::with_seed(seed);
    let mut items: Vec<Item> = Vec::new();
    let mut records: Vec<Record<'static>> = Vec::new();
    let mut certain = Vec::new();
    for number in 0..count {
        let moment = number as i64 * 10;
        let (start, end) = (moment - random.i64(0..60), moment + random.i64(0..60));
        let unknown = random.u8(0..8) == 0;
        let outcome = if unknown {
            Outcome::Unknown
        } else {
            Outcome::Ok
        };
        let happens = !unknown || random.bool();
        let mut made = record(number as u32, Action::List, None, start, end, Outcome::Ok);
        let mut sure = Vec::new();
        match random.u8(0..10) {
            0..=2 => {
                // Some share a creation time: then nothing tells which of them is on which page.
                let created = moment / 20;
                made = record(
                    number as u32,
                    Action::Create,
                    Some(number as u32),
                    start,
                    end,
                    outcome,
                );
                made.key = (!unknown).then(|| format!("item-{number}").into());
                made.created = (!unknown).then_some(created);
                if happens {
                    items.push(Item {
                        key: format!("item-{number}"),
                        created,
                        acknowledged: if unknown { i64::MAX } else { end },
                        doomed: i64::MAX,
                        living: true,
                    });
                }
            }
            3 if !items.is_empty() => {
                let at = random.usize(..items.len());
                let item = &mut items[at];
                made = record(number as u32, Action::Delete, None, start, end, outcome);
                made.key = Some(item.key.clone().into());
                if !item.living && !unknown {
                    made.outcome = Outcome::Absent;
                }
                item.doomed = item.doomed.min(start);
                item.living &= !happens;
            }
            _ => {
                let mut living: Vec<&Item> = items.iter().filter(|item| item.living).collect();
                living.sort_by_key(|item| std::cmp::Reverse(item.created));
                let from = random.usize(..=living.len());
                let to = random.usize(from..=living.len());
                let edge = |at: usize| living.get(at).map(|item| item.created);
                let newer = from.checked_sub(1).and_then(edge);
                let older = if to == living.len() {
                    None
                } else {
                    to.checked_sub(1).and_then(edge)
                };
                if to > from || to == living.len() {
                    made.window = Some((newer, older));
                }
                for item in &living[from..to] {
                    let inside = newer.is_none_or(|newer| item.created < newer)
                        && older.is_none_or(|older| item.created > older);
                    if inside && item.acknowledged < start && item.doomed > end {
                        sure.push(made.items.len());
                    }
                    let value = item.key.trim_start_matches("item-").to_owned();
                    made.items.push(crate::history::RecordedItem {
                        key: item.key.clone().into(),
                        value: value.into(),
                        version: None,
                        created: Some(item.created),
                    });
                }
            }
        }
        records.push(made);
        certain.push(sure);
    }
    (records, certain)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn lists_of_a_linearizable_collection_are_accepted(seed: u64, count in 1..120_usize) {
        let (records, _) = possible_collection(seed, count);
        match Judge::default().judge(&history_of(&records)) {
            Ok(found) => prop_assert!(found.linearizable(), "{:?}", found),
            Err(error) => prop_assert_eq!(error, JudgeError::Empty),
        }
    }

    #[test]
    fn an_item_taken_from_a_page_is_missed(seed: u64, which: prop::sample::Index) {
        let (mut records, certain) = possible_collection(seed, 80);
        // An item that was asked to be deleted later in the simulation may be explained by that
        // deletion being early.
        let places: Vec<(usize, usize)> = certain
            .iter()
            .enumerate()
            .flat_map(|(page, items)| items.iter().map(move |&item| (page, item)))
            .filter(|&(page, item)| {
                let (key, end) = (&records[page].items[item].key, records[page].end);
                records.iter().all(|other| {
                    other.action != Action::Delete
                        || other.key.as_ref() != Some(key)
                        || other.start > end
                })
            })
            .collect();
        prop_assume!(!places.is_empty());
        let (page, item) = places[which.index(places.len())];
        let key = records[page].items.remove(item).key;
        let history = history_of(&records);
        let found = Judge::default().judge(&history).unwrap();
        prop_assert_eq!(found.counts.keys().copied().collect::<Vec<_>>(), [Kind::ListMissesItem]);
        prop_assert_eq!(history.key_name(found.anomalies[0].key), key.as_ref());
    }
}

/// One line of a history as another program might write it: every field is allowed by itself, and
/// nothing makes sense.
fn any_record() -> impl Strategy<Value = Record<'static>> {
    let time = || {
        prop_oneof![
            Just(i64::MIN),
            Just(i64::MAX),
            Just(0),
            any::<i64>(),
            0..20_i64
        ]
    };
    let version = || proptest::option::of(prop_oneof![Just(u64::MAX), 0..4_u64]);
    let name = || proptest::option::of((0..4_u8).prop_map(|name| name.to_string().into()));
    let side = move || proptest::option::of(time());
    let item = (0..4_u8, 0..4_u8, version(), side()).prop_map(|(key, value, version, created)| {
        crate::history::RecordedItem {
            key: key.to_string().into(),
            value: value.to_string().into(),
            version,
            created,
        }
    });
    let kind = (
        prop::sample::select(&Action::ALL[..]),
        prop::sample::select(
            &[
                Outcome::Ok,
                Outcome::Absent,
                Outcome::Unknown,
                Outcome::Failed,
            ][..],
        ),
    );
    let page = (
        proptest::option::of((side(), side())),
        proptest::collection::vec(item, 0..3),
    );
    (
        kind,
        name(),
        name(),
        version(),
        side(),
        time(),
        time(),
        page,
    )
        .prop_map(
            |((action, outcome), key, value, version, created, start, end, (window, items))| {
                Record {
                    process: 0,
                    action,
                    key,
                    value,
                    version,
                    created,
                    start,
                    end,
                    outcome,
                    status: 200,
                    target: 0,
                    window,
                    items,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    /// Whatever a history says, if it is accepted it is judged and reported without a panic.
    #[test]
    fn nonsense_is_judged_and_reported(
        records in proptest::collection::vec(any_record(), 1..12),
    ) {
        let mut history = History::new(Header::default());
        let mut written = std::collections::HashSet::new();
        for record in records {
            let writes = matches!(record.action, Action::Create | Action::Update);
            // A value written twice ends the judgement at once.
            if !writes || written.insert(record.value.clone()) {
                let _ = history.push(&record);
            }
        }
        let judged = Judge::default().judge(&history);
        if let Err(error @ JudgeError::Unconfirmed { .. }) = &judged {
            prop_assert!(false, "{}", error);
        }
        let summary = crate::report::Summary::new(&history, &judged);
        prop_assert!(!crate::report::text(&summary).is_empty());
        prop_assert!(!crate::report::page(&summary, &history, judged.as_ref().ok()).is_empty());
    }
}

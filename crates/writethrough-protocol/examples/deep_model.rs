//! Explores the protocol's model far beyond the bounds of its test, and prints what it explored.
//!
//! ```text
//! cargo run --release -p writethrough-protocol --example deep_model -- [BOUND] [THREADS]
//! cargo run --release -p writethrough-protocol --example deep_model -- schedules
//! ```
//!
//! `BOUND` is the number of faults: 1, the default, takes minutes, 2 many times that. `schedules`
//! prints, for every rule left out, the shortest schedule that ends in a stale read. Exit status 1:
//! a stale read was found with every rule in place.
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

#[path = "../tests/model/fleet/mod.rs"]
mod fleet;

use std::process::ExitCode;
use std::time::Instant;

use fleet::bounds::{Bounds, Mutant};
use fleet::tally::Event;
use fleet::{NEVER_STALE, Search};
use stateright::{Checker, HasDiscoveries, Model};

fn searches(bound: u8) -> Vec<Bounds> {
    let deep = |text| Bounds::outage(text).faults(bound).moves(1);
    let met = &[
        Event::Hit,
        Event::HitAfterBypass,
        Event::Filled,
        Event::FillRefused,
        Event::Bypassed,
        Event::Fenced,
        Event::LateWrite,
        Event::AcknowledgedLate,
    ];
    let shared = &[Event::Hit, Event::Shared];
    let pages = &[Event::PageHit, Event::Shared];
    let mut all = vec![
        deep("WA RB RB").meets(met),
        deep("WA RA RB").meets(met),
        deep("WA RA RA").meets(shared),
        Bounds::outage("WA RB RB")
            .moves(2)
            .meets(&[Event::HitAfterBypass]),
        Bounds::outage("WA RA RB")
            .moves(2)
            .meets(&[Event::HitAfterBypass]),
        deep("WA WB RB").meets(met),
        deep("WA WA RB").meets(met),
        deep("WA LB LB").meets(pages),
        deep("WA LB MB"),
        deep("WA LB RB"),
        Bounds::outage("WA LB LB MB").faults(bound).meets(pages),
        deep("WA RB RB").evicting().meets(met),
        deep("WA LB LB").evicting().meets(pages),
        Bounds::outage("WA WB RB").faults(bound).evicting(),
        Bounds::outage("WA RB RB").faults(bound).slow_polls(),
        Bounds::outage("WA RB RB").faults(bound).ticks(3).drifting(),
        deep("WA RA RB RB").epochs(2).meets(&[Event::SharedBeside]),
        deep("WA RB RB")
            .promoting()
            .meets(&[Event::HitAfterPromotion]),
        deep("WA WB RB").promoting(),
        deep("WA RB RB")
            .replacing()
            .meets(&[Event::HitAfterReplacement]),
    ];
    all.extend(Mutant::DOUBLED.map(|mutant| deep("WA RB RB").without(mutant)));
    all
}

/// Explores depth first, which needs the least memory. Returns the number of states, or `None`
/// after printing a stale read.
fn explore(bounds: Bounds, threads: usize) -> Option<usize> {
    let started = Instant::now();
    let words = bounds.mutant.map_or("", Mutant::words);
    let checker = Search::new(bounds)
        .checker()
        .threads(threads)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_dfs()
        .join();
    let states = checker.unique_state_count();
    println!(
        "{states:>11} states, {:>11} steps, longest schedule {:>3}, {:>6.1} s  {} {words}",
        checker.state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f64(),
        checker.model().bounds,
    );
    if let Some(path) = checker.discovery(NEVER_STALE) {
        for line in checker.model().schedule(&path.into_actions()) {
            println!("  {line}");
        }
        return None;
    }
    checker.assert_properties();
    Some(states)
}

fn schedules() {
    for mutant in Mutant::NEEDED {
        println!("\n{}:", mutant.words());
        for (place, line) in mutant.schedule().into_iter().flatten().enumerate() {
            println!("{:>4}  {line}", place + 1);
        }
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next().unwrap_or_else(|| "1".to_owned());
    if first == "schedules" {
        schedules();
        return ExitCode::SUCCESS;
    }
    let threads = arguments.next().and_then(|text| text.parse().ok());
    let Ok(bound) = first.parse() else {
        println!("usage: deep_model [BOUND] [THREADS] | schedules");
        return ExitCode::from(2);
    };
    let started = Instant::now();
    let mut total = 0;
    for bounds in searches(bound) {
        match explore(bounds, threads.unwrap_or(1)) {
            Some(states) => total += states,
            None => return ExitCode::FAILURE,
        }
    }
    println!(
        "{total} states in {:.0} s: no stale read is reachable",
        started.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}

//! The protocol under a model checker: no stale read is reachable with every rule in place, and
//! each rule left out is caught by a schedule. Small bounds; `examples/deep_model.rs` has large ones.

#![allow(
    clippy::print_stdout,
    reason = "schedules are what a failing or a curious run is for"
)]

mod fleet;

use fleet::bounds::{Bounds, Mutant};
use fleet::tally::Event;
use fleet::{NEVER_STALE, Search};
use stateright::{Checker, HasDiscoveries, Model};

/// Explores everything within the bounds; fails with the schedule of a stale read.
fn holds(bounds: Bounds) {
    let checker = Search::new(bounds)
        .checker()
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!(
        "{}: {} states",
        checker.model().bounds,
        checker.unique_state_count()
    );
    if let Some(path) = checker.discovery(NEVER_STALE) {
        let schedule = checker.model().schedule(&path.into_actions());
        panic!("{}", schedule.join("\n"));
    }
    checker.assert_properties();
}

#[test]
fn one_write_and_two_reads_through_an_outage() {
    let met = &[
        Event::Hit,
        Event::HitAfterBypass,
        Event::Shared,
        Event::Filled,
        Event::FillRefused,
        Event::Bypassed,
        Event::Fenced,
        Event::LateWrite,
        Event::AcknowledgedLate,
    ];
    holds(Bounds::outage("WA RB RB").faults(1).meets(met));
    holds(Bounds::outage("WA RA RB").faults(1));
}

#[test]
fn one_write_and_two_reads_through_a_failover() {
    let met = &[Event::Hit, Event::HitAfterBypass, Event::AcknowledgedLate];
    holds(Bounds::outage("WA RB RB").moves(1).meets(met));
    let both = Bounds::outage("WA RB RB").faults(1).moves(1);
    holds(both.ticks(1));
}

/// A load of any length: its lease lasts, reads of the other node load beside it and share that.
#[test]
fn readers_follow_the_lease_of_another_process() {
    let met = &[Event::SharedBeside, Event::Filled, Event::FillRefused];
    holds(Bounds::calm("WA RA RB RB").faults(1).meets(met));
    holds(Bounds::outage("WA RA RB RB").epochs(2).ticks(1).meets(met));
}

#[test]
fn the_database_fails_over_to_a_lagging_standby() {
    let met = &[Event::Hit, Event::HitAfterPromotion, Event::Fenced];
    holds(Bounds::outage("WA RB RB").promoting().meets(met));
    holds(Bounds::outage("WA WB RB").promoting().ticks(1));
    holds(Bounds::outage("WA RB").faults(1).promoting());
}

#[test]
fn a_server_takes_over_the_contents_of_another() {
    let met = &[Event::Hit, Event::HitAfterReplacement];
    // With two ticks it has more than twice the states; `deep_model` goes there, and beyond.
    holds(Bounds::outage("WA RB RB").replacing().ticks(1).meets(met));
    holds(Bounds::outage("WA RB").replacing().faults(1));
}

#[test]
fn two_writes_and_a_read() {
    let met = &[Event::Hit, Event::HitAfterBypass, Event::Fenced];
    holds(Bounds::outage("WA WB RB").faults(1).meets(met));
    holds(Bounds::outage("WA WB RB").moves(1).ticks(1));
    holds(Bounds::calm("WA WB RB").faults(3));
}

#[test]
fn lists() {
    let met = &[Event::PageHit, Event::Shared, Event::FillRefused];
    holds(Bounds::outage("WA LB LB").faults(1).meets(met));
    holds(Bounds::outage("WA LB LB").moves(1));
    holds(Bounds::outage("WA LB RB").faults(1).ticks(1));
    holds(Bounds::calm("WA LB LB MB").faults(1).meets(met));
}

#[test]
fn acknowledged_writes_survive_an_evicted_intent() {
    let met = &[Event::Hit, Event::FillRefused, Event::AcknowledgedLate];
    holds(Bounds::outage("WA RB RB").faults(1).evicting().meets(met));
    holds(Bounds::outage("WA LB LB").faults(1).evicting());
    holds(Bounds::calm("WA WB RB").faults(2).evicting());
}

#[test]
fn slow_polls_and_drifting_clocks() {
    let met = &[Event::Hit, Event::AcknowledgedLate];
    let short = Bounds::outage("WA RB RB").faults(1).epochs(2);
    holds(short.clone().slow_polls().ticks(1));
    holds(short.drifting().meets(met));
}

#[test]
fn every_rule_left_out_is_caught() {
    for mutant in Mutant::NEEDED {
        let Some(schedule) = mutant.schedule() else {
            panic!("not caught: {} ({})", mutant.words(), mutant.search());
        };
        println!("\n{} ({} steps):", mutant.words(), schedule.len());
        for line in schedule {
            println!("  {line}");
        }
    }
}

/// A read asks for its node's lease when it begins and after its get. A read that asked at either
/// time lies at least in part before the next epoch's first write, so one of the two is enough.
#[test]
fn one_check_of_the_lease_is_enough() {
    for mutant in Mutant::DOUBLED {
        holds(mutant.search());
        holds(
            Bounds::outage("WA RB RB")
                .faults(1)
                .ticks(1)
                .without(mutant),
        );
    }
}

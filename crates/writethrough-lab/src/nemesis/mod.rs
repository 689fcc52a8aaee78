//! The nemesis: the faults that it causes in a cluster, and what must hold when it has gone.
//!
//! | module | what it is |
//! |---|---|
//! | `fault` | the kinds of fault, and which of them cannot be in force together |
//! | `schedule` | which fault begins when: a value that follows from a seed |
//! | `inject` | how each fault is caused in a cluster, and undone |
//! | `stop` | the end of the run, as the faults see it |
//! | `audit` | each item as every node serves it, compared with what Postgres holds |
//!
//! The nemesis judges nothing, and no fault excuses an anomaly. It writes down when each fault was in force
//! ([`FaultWindow`]), so that the report can say how well the service answered meanwhile.

mod audit;
mod fault;
mod inject;
mod schedule;
mod stop;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, OwnedMutexGuard, watch},
    task::{JoinHandle, JoinSet},
};

use self::stop::Stop;
pub use self::{
    audit::{AuditError, audit},
    fault::{Fault, Faults, Hold},
    schedule::{AT_ONCE, LONGEST_PAUSE, Plan, Planned, Span, Told, schedule},
};
use crate::cluster::Cluster;
use writethrough_check::{history::FaultWindow, time::Clock};

/// What the nemesis did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NemesisLog {
    /// The faults, by their beginning.
    pub faults: Vec<FaultWindow>,
    /// Why a fault could not be caused or undone: the cluster, not the service, failed.
    pub errors: Vec<String>,
}

/// What faults take hold of: a lock for each thing.
type Holds = BTreeMap<Hold, Arc<Mutex<()>>>;

fn holds(nodes: usize) -> Holds {
    let of_one = |node| {
        [
            Hold::RedisLink(node),
            Hold::PostgresLink(node),
            Hold::Node(node),
        ]
    };
    let holds = (0..nodes).flat_map(of_one);
    let holds = holds.chain([Hold::Redis, Hold::Intents, Hold::Postgres]);
    holds.map(|hold| (hold, Arc::default())).collect()
}

/// A schedule that is being carried out.
#[derive(Debug)]
pub struct Nemesis {
    task: JoinHandle<NemesisLog>,
    stop: watch::Sender<bool>,
}

impl Nemesis {
    /// Carries out a schedule on a cluster, at the times of `clock`. A fault begins late when it takes hold of something
    /// that another one has not let go of.
    #[must_use]
    pub fn start(cluster: Arc<Cluster>, schedule: Vec<Planned>, clock: Clock) -> Self {
        let (sender, stop) = Stop::channel();
        let holds = Arc::new(holds(cluster.nodes().len()));
        let task = tokio::spawn(async move {
            let mut running = JoinSet::new();
            for planned in schedule {
                running.spawn(carry_out(
                    Arc::clone(&cluster),
                    Arc::clone(&holds),
                    planned,
                    clock,
                    stop.clone(),
                ));
            }
            let mut deeds = NemesisLog::default();
            while let Some(ended) = running.join_next().await {
                match ended {
                    Ok(None) => {}
                    Ok(Some(Ok(disturbance))) => deeds.faults.push(disturbance),
                    Ok(Some(Err(error))) => deeds.errors.push(error),
                    Err(error) => deeds.errors.push(error.to_string()),
                }
            }
            deeds.faults.sort_by_key(|fault| fault.from);
            deeds
        });
        Self { task, stop: sender }
    }

    /// Ends and undoes the faults in force, begins no other, and tells what was done.
    pub async fn finish(self) -> NemesisLog {
        self.stop.send_replace(true);
        self.task.await.unwrap_or_else(|error| NemesisLog {
            faults: Vec::new(),
            errors: vec![error.to_string()],
        })
    }
}

/// Causes one fault when its time has come; `None` when the end came first.
async fn carry_out(
    cluster: Arc<Cluster>,
    holds: Arc<Holds>,
    planned: Planned,
    clock: Clock,
    mut stop: Stop,
) -> Option<Result<FaultWindow, String>> {
    let ahead = u64::try_from(planned.at_ns - clock.now()).unwrap_or(0);
    if stop.comes_within(Duration::from_nanos(ahead)).await {
        return None;
    }
    let nodes = cluster.nodes().len();
    let _held = hold(&holds, &planned, nodes).await;
    if stop.has_come() {
        return None;
    }
    let from = clock.now();
    let injected = inject::inject(&cluster, &planned, &mut stop).await;
    let to = clock.now();
    let number = |node: usize| u16::try_from(node).unwrap_or(u16::MAX);
    let down = planned.fault.takes_down(planned.node, nodes);
    Some(match injected {
        Err(error) => Err(format!("{planned}: {error}")),
        Ok(()) => Ok(FaultWindow {
            fault: planned.fault.name().to_owned(),
            target: planned
                .fault
                .concerns_one_node()
                .then_some(number(planned.node)),
            from,
            to,
            down: down.into_iter().map(number).collect(),
            resets_writes: planned.fault.resets_writes(),
        }),
    })
}

/// Waits until nobody else holds what a fault takes hold of, and holds it.
async fn hold(holds: &Holds, planned: &Planned, nodes: usize) -> Vec<OwnedMutexGuard<()>> {
    let mut held = Vec::new();
    // All in one order, so that no two wait for each other.
    for hold in planned.fault.holds(planned.node, nodes) {
        if let Some(lock) = holds.get(&hold) {
            held.push(Arc::clone(lock).lock_owned().await);
        }
    }
    held
}

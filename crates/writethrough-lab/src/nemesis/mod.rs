//! The nemesis: a cluster of its own, the faults that it causes there, and what must hold when it has gone.
//!
//! | module | what it is |
//! |---|---|
//! | `fault` | the kinds of fault, and which of them cannot be in force together |
//! | `schedule` | which fault begins when: a value that follows from a seed |
//! | `cluster` | Postgres, Redis with a replica, nodes behind links; how each fault is caused and undone |
//! | `audit` | each item as every node serves it, compared with what Postgres holds |
//!
//! The nemesis judges nothing, and no fault excuses an anomaly. It writes down when each fault was in force
//! ([`FaultWindow`]), so that the report can say how well the service answered meanwhile.

mod audit;
mod cluster;
mod fault;
mod schedule;

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};

pub use self::{
    audit::{AuditError, audit},
    cluster::{Cluster, ClusterSettings},
    fault::{Fault, Faults, Hold},
    schedule::{AT_ONCE, LONGEST_PAUSE, Plan, Planned, Span, schedule},
};
use writethrough_check::{history::FaultWindow, time::Clock};

/// What the nemesis did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deeds {
    /// The faults, by their beginning.
    pub faults: Vec<FaultWindow>,
    /// Why a fault could not be caused or undone: the cluster, not the service, failed.
    pub errors: Vec<String>,
}

/// A schedule that is being carried out.
#[derive(Debug)]
pub struct Nemesis {
    task: JoinHandle<Deeds>,
    stop: watch::Sender<bool>,
}

impl Nemesis {
    /// Carries out a schedule on a cluster, at the times of `clock`. A fault begins late when it takes hold of something
    /// that another one has not let go of.
    #[must_use]
    pub fn start(cluster: Arc<Cluster>, schedule: Vec<Planned>, clock: Clock) -> Self {
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut running = JoinSet::new();
            for planned in schedule {
                running.spawn(carry_out(
                    Arc::clone(&cluster),
                    planned,
                    clock,
                    stopped.clone(),
                ));
            }
            let mut deeds = Deeds::default();
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
        Self { task, stop }
    }

    /// Ends and undoes the faults in force, begins no other, and tells what was done.
    pub async fn finish(self) -> Deeds {
        self.stop.send_replace(true);
        self.task.await.unwrap_or_else(|error| Deeds {
            faults: Vec::new(),
            errors: vec![error.to_string()],
        })
    }
}

/// Causes one fault when its time has come; `None` when the end came first.
async fn carry_out(
    cluster: Arc<Cluster>,
    planned: Planned,
    clock: Clock,
    mut stopped: watch::Receiver<bool>,
) -> Option<Result<FaultWindow, String>> {
    let ahead = u64::try_from(planned.at_ns - clock.now()).unwrap_or(0);
    if wait(Duration::from_nanos(ahead), &mut stopped).await {
        return None;
    }
    let _held = cluster.hold(&planned).await;
    if *stopped.borrow() {
        return None;
    }
    let from = clock.now();
    let inflicted = cluster.inflict(&planned, &mut stopped).await;
    let to = clock.now();
    let number = |node: usize| u16::try_from(node).unwrap_or(u16::MAX);
    let down = planned.fault.takes_down(planned.node, cluster.nodes());
    Some(match inflicted {
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

/// Lets time pass; true when the end came first.
async fn wait(time: Duration, stopped: &mut watch::Receiver<bool>) -> bool {
    let stop = stopped.wait_for(|stopped| *stopped);
    tokio::time::timeout(time, stop).await.is_ok()
}

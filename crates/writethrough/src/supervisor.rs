//! Keeps the node's view current: polls the epoch row, follows the cache connection, proposes
//! changes of the epoch.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, timeout};
use writethrough_protocol::{Astray, Epoch, Mode, Node, Proposal, ReadPermit, ServerId, Sighting};

use crate::cache::IN_PROCESS;
use crate::clock;
use crate::engine::{Engine, Proposed};
use crate::error::FenceError;

/// The bound of one proposal, beyond the short lock wait of the fence itself.
const PROPOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// How many epochs with in-process caches of others a node meets before it gives its own up.
const MAX_MET: usize = 3;

/// Starts the tasks that run until the engine stops.
pub(crate) fn start(engine: &Arc<Engine>) {
    let follow = follow_sessions(engine.clone());
    let name = "the one that follows the cache connection";
    tokio::spawn(until_stopped(engine.clone(), name, follow));
    let poll = poll_epochs(engine.clone());
    let name = "the one that polls the epoch row";
    tokio::spawn(until_stopped(engine.clone(), name, poll));
}

/// Tells when a background task ends that should not: it has panicked, or its runtime is gone.
struct Alive(Arc<Engine>, &'static str);

impl Drop for Alive {
    fn drop(&mut self) {
        let Self(engine, name) = self;
        if *engine.stopping.borrow() || engine.ended.set(name).is_err() {
            return;
        }
        tracing::error!(
            "a background task of the engine has ended, {name}: this node uses no cache and writes \
             nothing until it is started again"
        );
        *engine.fence_error() = Some(FenceError::Broken(format!(
            "a background task has ended, {name}"
        )));
        engine.change(|view| {
            view.session = None;
            view.node = Node::new(engine.settings.timing);
        });
    }
}

async fn until_stopped(engine: Arc<Engine>, name: &'static str, task: impl Future<Output = ()>) {
    let _alive = Alive(engine.clone(), name);
    let mut stopping = engine.stopping.subscribe();
    tokio::select! {
        () = task => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

async fn follow_sessions(engine: Arc<Engine>) {
    let mut sessions = engine.cache.sessions();
    loop {
        let session = sessions.borrow_and_update().clone();
        engine.change(|view| {
            let server = session.as_ref().map(|session| session.server().clone());
            view.node.connection_changed(server);
            view.session = session;
        });
        engine.poll_now.notify_one();
        if sessions.changed().await.is_err() {
            // The cache was dropped: there will be no other session.
            std::future::pending::<()>().await;
        }
    }
}

/// Whether a read that came now would look into the cache.
pub(crate) fn uses_cache(engine: &Engine) -> bool {
    let permit = engine.view().node.read_permit(clock::now());
    matches!(permit, ReadPermit::Cached(_))
}

async fn poll_epochs(engine: Arc<Engine>) {
    let mut ticks = tokio::time::interval(engine.settings.poll);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_logged = None;
    let mut read_only = false;
    let mut lost_at = Some(Instant::now());
    let mut last = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = engine.poll_now.notified() => {}
        }
        if !uses_cache(&engine) {
            engine
                .counters
                .degraded_us
                .add(last.elapsed().as_micros() as u64);
        }
        last = Instant::now();
        lost_at = if engine.view().session.is_some() {
            None
        } else {
            lost_at.or_else(|| Some(Instant::now()))
        };
        let polled = poll(&engine).await;
        if engine.ended.get().is_some() {
            return;
        }
        match polled {
            Ok(sighting) => {
                if last_logged.take().is_some() {
                    tracing::info!("the epoch row can be used again");
                }
                *engine.fence_error() = None;
                match (engine.fence.refuses_changes(), read_only) {
                    (Some(error), _) => {
                        changes_refused(&engine, Some(error));
                        read_only = true;
                    }
                    (None, true) => {
                        changes_refused(&engine, None);
                        read_only = false;
                    }
                    (None, false) => {}
                }
                reconcile(&engine, &sighting, lost_at).await;
            }
            Err(error) => {
                *engine.fence_error() = Some(error.clone());
                if last_logged.as_ref() != Some(&error) {
                    tracing::warn!("the epoch row cannot be used: {error}");
                    // Writes that wait for an epoch must not wait for one that is not to come.
                    engine.change(|_| {});
                    last_logged = Some(error);
                }
            }
        }
    }
}

async fn poll(engine: &Engine) -> Result<Sighting, FenceError> {
    // Taken before the row is read: the lease counts from here.
    let started = clock::now();
    let sighting = bounded(engine.settings.poll_timeout, engine.fence.poll()).await?;
    observe(engine, &sighting, Some(started));
    Ok(sighting)
}

async fn bounded<T>(
    bound: Duration,
    work: impl Future<Output = Result<T, FenceError>>,
) -> Result<T, FenceError> {
    timeout(bound, work)
        .await
        .unwrap_or_else(|_| Err(FenceError::Away(format!("no reply in {bound:?}"))))
}

fn observe(
    engine: &Engine,
    sighting: &Sighting,
    started: Option<writethrough_protocol::Monotonic>,
) {
    let (changed, before, astray) = engine.change(|view| {
        let before = view.node.astray();
        let changed = view.node.saw(sighting, started, clock::now());
        if changed && let Some(row) = view.node.row() {
            view.frame = view.frame.in_epoch(row).into();
        }
        (changed, before, view.node.astray())
    });
    if astray != before {
        match astray {
            Some(Astray::OtherHistory) => tracing::warn!(
                "the database has another history than its epoch row (a standby was promoted, or a \
                 backup restored): nothing cached is believed until a new epoch begins"
            ),
            Some(Astray::WentBack { seen, found }) => tracing::warn!(
                "the epoch went back from {seen} to {found}: the database has lost a part of its \
                 history; nothing cached is believed until a new epoch begins"
            ),
            None => tracing::info!("the database and its epoch row agree again"),
        }
    }
    if changed {
        if let Mode::Cached(server) = &sighting.row.mode {
            meet(engine, server);
        }
        engine.counters.epoch_changes.add(1);
        let mode = match &sighting.row.mode {
            Mode::Bypass => "bypass".to_owned(),
            Mode::Cached(server) => format!("cached on {server}"),
        };
        let settled = sighting.row.settled;
        tracing::info!(
            epoch = sighting.row.number.0,
            history = %sighting.row.history,
            settled,
            "new epoch: {mode}"
        );
    }
}

/// Gives this node's in-process cache up when other nodes have theirs: in turn each would end the
/// epoch of the others, for ever. The first epoch of another may be that of this node's last life.
fn meet(engine: &Engine, server: &ServerId) {
    let own = engine.view().session.clone();
    let both_in_process = own.is_some_and(|own| {
        own.server() != server
            && [own.server(), server]
                .iter()
                .all(|id| id.as_str().starts_with(IN_PROCESS))
    });
    if both_in_process && engine.met.fetch_add(1, Ordering::Relaxed) + 1 == MAX_MET {
        tracing::warn!(
            "other nodes of this database have in-process caches too, which only a single node can use: \
             going on without the cache. Give all nodes one Redis, or run one node, and start again"
        );
        engine.cache.close();
    }
}

/// Does what the node's state asks for after a poll.
async fn reconcile(engine: &Arc<Engine>, sighting: &Sighting, lost_at: Option<Instant>) {
    let now = clock::now();
    let (settle, proposal) = {
        let node = &engine.view().node;
        (node.should_settle(now), node.proposal(sighting, now))
    };
    if let Some(epoch) = settle
        && let Err(error) = changing(engine, engine.fence.mark_settled(epoch)).await
    {
        tracing::debug!("marking epoch {epoch} settled failed, the next poll tries again: {error}");
    }
    // A connection that is replaced at once was a blip: nothing is lost that was not retried.
    let lost = lost_at.is_some_and(|at| at.elapsed() >= engine.settings.reconnect_grace);
    if lost && let Err(error) = changing(engine, engine.fence.report_trouble()).await {
        tracing::debug!("reporting trouble failed, the next poll tries again: {error}");
    }
    let Some(proposal) = proposal else {
        return;
    };
    let ends_epoch = matches!(
        proposal,
        Proposal::Next {
            mode: Mode::Bypass,
            ..
        }
    );
    // A blip of the connection is waited for; another history of the database is not. A node that is
    // late itself has no say in whether the cache is well.
    let blip = lost_at.is_some() && !lost && !matches!(proposal, Proposal::NewHistory { .. });
    if blip || (ends_epoch && engine.lateness.within(engine.settings.reconnect_grace)) {
        return;
    }
    if let Ok(_one) = engine.proposing.try_lock() {
        if ends_epoch {
            let connected = engine.view().session.is_some();
            let reason = if connected {
                "this node is connected to another server or data set than the epoch's".to_owned()
            } else {
                unconnected(engine)
            };
            say_why(engine, proposal.from(), reason);
        }
        if let Err(error) = propose(engine, &proposal).await {
            tracing::debug!("a proposal failed, the next poll tries again: {error}");
        }
    }
}

/// That there is no connection to the epoch's server, and why.
pub(crate) fn unconnected(engine: &Engine) -> String {
    let trouble = engine.cache.trouble().map(|error| format!(": {error}"));
    let trouble = trouble.unwrap_or_default();
    format!("this node has no verified connection to the epoch's server{trouble}")
}

/// Says once for each epoch why this node wants to end it.
fn say_why(engine: &Engine, epoch: Epoch, reason: String) {
    let mut proposed = engine
        .proposed
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if proposed.as_ref().is_none_or(|last| last.epoch != epoch) {
        tracing::warn!(
            epoch = epoch.0,
            "proposing to go on without the cache: {reason}"
        );
        let at = Instant::now();
        *proposed = Some(Proposed { epoch, reason, at });
    }
}

/// Bounds a change of the epoch row, and says once when the fence does not allow it.
async fn changing<T>(
    engine: &Engine,
    change: impl Future<Output = Result<T, FenceError>>,
) -> Result<T, FenceError> {
    let result = bounded(PROPOSE_TIMEOUT, change).await;
    match &result {
        Ok(_) => changes_refused(engine, None),
        // While it is known why, the database's words for each change add nothing.
        Err(error @ FenceError::Broken(_)) if engine.fence.refuses_changes().is_none() => {
            changes_refused(engine, Some(error.clone()));
        }
        Err(_) => {}
    }
    result
}

fn changes_refused(engine: &Engine, refused: Option<FenceError>) {
    let mut last_logged = engine
        .refused_change
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if *last_logged != refused {
        match &refused {
            Some(error) => tracing::warn!("this node cannot change the epoch row: {error}"),
            None => tracing::info!("this node can change the epoch row again"),
        }
        *last_logged = refused;
    }
}

async fn propose(engine: &Engine, proposal: &Proposal) -> Result<(), FenceError> {
    let sighting = changing(engine, engine.fence.propose(proposal)).await?;
    observe(engine, &sighting, None);
    // The answer to a proposal gives no lease; the poll that it asks for does.
    engine.poll_now.notify_one();
    Ok(())
}

/// Sees to it that `epoch` is over, for a writer that could not announce or end its write in it.
/// Returns false when that could not be done by `deadline`.
pub(crate) async fn end_epoch(
    engine: &Engine,
    epoch: Epoch,
    reason: String,
    deadline: Instant,
) -> bool {
    let over = || {
        engine
            .view()
            .node
            .row()
            .is_some_and(|row| row.number > epoch)
    };
    let attempts = async {
        loop {
            let _one = engine.proposing.lock().await;
            if over() || engine.ended.get().is_some() {
                return;
            }
            say_why(engine, epoch, reason.clone());
            if let Err(error) = propose(engine, &Node::bypass_from(epoch)).await {
                tracing::debug!("proposing bypass failed, trying again: {error}");
                // Lets the writes through that queued up behind the proposal.
                tokio::time::sleep(Duration::from_millis(20 + fastrand::u64(..30))).await;
            }
        }
    };
    let _ = tokio::time::timeout_at(deadline, attempts).await;
    over()
}

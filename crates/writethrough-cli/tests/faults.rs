//! Faults on real servers with two API nodes: while a load goes on through both, no read is stale,
//! and reads and writes succeed; and the textbook pattern, under the same faults, is caught.
//!
//! The oracle: each item has one writer, which writes the numbers 1, 2, 3, ... as its name, through
//! either node in turn. Everybody shares the item's *floor*, the highest number acknowledged to the
//! writer or seen by a read that has ended. A read that starts afterwards and returns less is stale.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows its figures when it does"
)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use writethrough_lab::cluster::{Cluster, Consistency, Node, Serve};
use writethrough_testbed::until;

const PATIENCE: Duration = Duration::from_secs(20);
/// The longest that a write may wait around the switch from one epoch to the next.
const LONGEST_WRITE: Duration = Duration::from_millis(2500);
/// How soon after Redis' return reads must hit again.
const HITS_RESUME: Duration = Duration::from_secs(5);
const ITEMS: usize = 6;

struct Lab {
    cluster: Cluster,
    client: Client,
}

impl Lab {
    async fn new(consistency: Consistency) -> Self {
        Self::with_replica(consistency, false).await
    }

    async fn with_replica(consistency: Consistency, replica: bool) -> Self {
        let serve = Serve::new("node", env!("CARGO_BIN_EXE_writethrough")).consistency(consistency);
        let cluster = Cluster::behind_links(2, replica, &serve).await.unwrap();
        let client = Client::builder()
            .timeout(Duration::from_secs(15))
            .build()
            .unwrap();
        let lab = Self { cluster, client };
        for node in lab.cluster.nodes() {
            lab.wait_for_hits(node).await;
        }
        lab
    }

    /// The two nodes.
    fn pair(&self) -> [&Node; 2] {
        let nodes = self.cluster.nodes();
        [&nodes[0], &nodes[1]]
    }

    async fn get(&self, node: &Node, id: &str) -> Option<(u64, String)> {
        let response = self
            .client
            .get(format!("{}/items/{id}", node.url()))
            .send()
            .await
            .ok()?;
        if response.status() != StatusCode::OK {
            return None;
        }
        let cache = response
            .headers()
            .get("cache-status")?
            .to_str()
            .ok()?
            .to_owned();
        let item: Value = response.json().await.ok()?;
        Some((item["name"].as_str()?.parse().ok()?, cache))
    }

    async fn create(&self, node: &Node) -> String {
        let body = json!({"name": "0", "price": 1});
        let url = format!("{}/items", node.url());
        let response = self.client.post(url).json(&body).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::CREATED);
        response.json::<Value>().await.unwrap()["id"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    async fn put(&self, node: &Node, id: &str, number: u64) -> bool {
        let body = json!({"name": number.to_string(), "price": 1});
        let url = format!("{}/items/{id}", node.url());
        let response = self.client.put(url).json(&body).send().await;
        response.is_ok_and(|response| response.status() == StatusCode::OK)
    }

    /// Waits until the node serves from the cache, and tells how long that took.
    async fn wait_for_hits(&self, node: &Node) -> Duration {
        let started = Instant::now();
        let sample = format!("{}/items/550e8400-e29b-41d4-a716-446655440001", node.url());
        until(&format!("{} hits", node.url()), PATIENCE, || async {
            let response = self.client.get(&sample).send().await.ok()?;
            let cache = response
                .headers()
                .get("cache-status")?
                .to_str()
                .ok()?
                .to_owned();
            cache.contains("hit").then_some(())
        })
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", node.process().log_tail(30)));
        started.elapsed()
    }

    /// Runs a load through both nodes while `fault` happens, then looks at every item once more.
    async fn under_load(self: &Arc<Self>, fault: impl Future<Output = ()>) -> Report {
        let mut ids = Vec::new();
        for _ in 0..ITEMS {
            ids.push(self.create(&self.cluster.nodes()[0]).await);
        }
        let load = Arc::new(Load {
            lab: self.clone(),
            ids,
            ..Load::default_for(self.clone())
        });
        let mut tasks = JoinSet::new();
        for item in 0..ITEMS {
            tasks.spawn(load.clone().write_on(item));
            tasks.spawn(load.clone().read_on(item, 0));
            tasks.spawn(load.clone().read_on(item, 1));
        }
        until("the load runs", PATIENCE, || async {
            (load.reads.load(Ordering::SeqCst) > 200).then_some(())
        })
        .await
        .unwrap();
        fault.await;
        load.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        for item in 0..ITEMS {
            for node in [0, 1, 0, 1] {
                load.read(item, node).await;
            }
        }
        let report = Report {
            stale: std::mem::take(&mut load.stale.lock().unwrap()),
            reads: load.reads.load(Ordering::SeqCst),
            failed_reads: load.failed_reads.load(Ordering::SeqCst),
            writes: load.writes.load(Ordering::SeqCst),
            failed_writes: load.failed_writes.load(Ordering::SeqCst),
            longest_write: *load.longest_write.lock().unwrap(),
        };
        println!("{report:#?}");
        report
    }
}

struct Load {
    lab: Arc<Lab>,
    ids: Vec<String>,
    floors: [AtomicU64; ITEMS],
    stop: AtomicBool,
    reads: AtomicU64,
    failed_reads: AtomicU64,
    writes: AtomicU64,
    failed_writes: AtomicU64,
    longest_write: Mutex<Duration>,
    stale: Mutex<Vec<String>>,
}

#[derive(Debug)]
#[allow(dead_code, reason = "printed as a whole")]
struct Report {
    stale: Vec<String>,
    reads: u64,
    failed_reads: u64,
    writes: u64,
    failed_writes: u64,
    longest_write: Duration,
}

impl Report {
    #[track_caller]
    fn assert_nothing_stale(&self) {
        assert!(self.stale.is_empty(), "stale reads: {:#?}", self.stale);
        assert!(
            self.reads > 200 && self.writes > 20,
            "the load was too small: {self:?}"
        );
    }

    #[track_caller]
    fn assert_something_stale(&self) {
        assert!(
            !self.stale.is_empty(),
            "no stale read was found, so this oracle is blind"
        );
    }

    /// Nothing failed and no write waited too long: what is promised while Postgres is there.
    #[track_caller]
    fn assert_available(&self) {
        assert_eq!((self.failed_reads, self.failed_writes), (0, 0), "{self:?}");
        assert!(self.longest_write <= LONGEST_WRITE, "{self:?}");
    }
}

impl Load {
    fn default_for(lab: Arc<Lab>) -> Self {
        Self {
            lab,
            ids: Vec::new(),
            floors: Default::default(),
            stop: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            failed_reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            failed_writes: AtomicU64::new(0),
            longest_write: Mutex::default(),
            stale: Mutex::default(),
        }
    }

    async fn read(&self, item: usize, node: usize) {
        let floor = self.floors[item].load(Ordering::SeqCst);
        match self
            .lab
            .get(&self.lab.cluster.nodes()[node], &self.ids[item])
            .await
        {
            None => {
                self.failed_reads.fetch_add(1, Ordering::SeqCst);
            }
            Some((number, cache)) => {
                self.reads.fetch_add(1, Ordering::SeqCst);
                if number < floor {
                    let node = if node == 0 { "a" } else { "b" };
                    let stale =
                        format!("item {item}: {number} after {floor}, node {node}, {cache}");
                    self.stale.lock().unwrap().push(stale);
                }
                self.floors[item].fetch_max(number, Ordering::SeqCst);
            }
        }
    }

    async fn read_on(self: Arc<Self>, item: usize, node: usize) {
        while !self.stop.load(Ordering::SeqCst) {
            self.read(item, node).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn note_duration(&self, took: Duration) {
        let mut longest = self.longest_write.lock().unwrap();
        *longest = longest.max(took);
    }

    async fn write_on(self: Arc<Self>, item: usize) {
        let mut number = 0;
        while !self.stop.load(Ordering::SeqCst) {
            number += 1;
            let started = Instant::now();
            let node = &self.lab.cluster.nodes()[number as usize % 2];
            if self.lab.put(node, &self.ids[item], number).await {
                self.floors[item].fetch_max(number, Ordering::SeqCst);
                self.writes.fetch_add(1, Ordering::SeqCst);
            } else {
                self.failed_writes.fetch_add(1, Ordering::SeqCst);
            }
            self.note_duration(started.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Lets the load go on for a while: this is the fault's duration, not a wait for a fact.
async fn for_a_while() {
    tokio::time::sleep(Duration::from_secs(2)).await;
}

impl Lab {
    async fn assert_hits_resume(&self) {
        for node in self.cluster.nodes() {
            let took = self.wait_for_hits(node).await;
            assert!(
                took < HITS_RESUME,
                "{} hit again only after {took:?}",
                node.url()
            );
        }
    }
}

macro_rules! fault_test {
    ($(#[$doc:meta])* $name:ident, $lab:ident, $fault:block) => {
        $(#[$doc])*
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let lab = Arc::new(Lab::with_replica(Consistency::Strict, false).await);
            let $lab = lab.clone();
            let report = lab.under_load(async move { $fault }).await;
            report.assert_nothing_stale();
            report.assert_available();
        }
    };
}

fault_test!(redis_is_killed_and_comes_back, lab, {
    lab.cluster.redis().kill().await.unwrap();
    for_a_while().await;
    lab.cluster.redis().start().await.unwrap();
    lab.assert_hits_resume().await;
});

fault_test!(redis_hangs_and_goes_on, lab, {
    lab.cluster.redis().pause().await.unwrap();
    for_a_while().await;
    lab.cluster.redis().resume().await.unwrap();
    lab.assert_hits_resume().await;
});

fault_test!(redis_hangs_for_a_moment, lab, {
    lab.cluster.redis().pause().await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    lab.cluster.redis().resume().await.unwrap();
    lab.assert_hits_resume().await;
});

fault_test!(one_node_is_cut_off_from_redis, lab, {
    lab.cluster.nodes()[0].redis().unwrap().cut();
    for_a_while().await;
    lab.cluster.nodes()[0].redis().unwrap().heal();
    lab.assert_hits_resume().await;
});

fault_test!(one_nodes_redis_link_stalls, lab, {
    lab.cluster.nodes()[1].redis().unwrap().stall();
    for_a_while().await;
    lab.cluster.nodes()[1].redis().unwrap().heal();
    lab.assert_hits_resume().await;
});

fault_test!(one_nodes_redis_connection_is_reset, lab, {
    for _ in 0..10 {
        lab.cluster.nodes()[0].redis().unwrap().reset();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    lab.assert_hits_resume().await;
});

fault_test!(redis_restarts_empty, lab, {
    lab.cluster.redis().restart_empty().await.unwrap();
    lab.assert_hits_resume().await;
    for_a_while().await;
});

fault_test!(redis_is_flushed, lab, {
    for _ in 0..5 {
        lab.cluster.redis().flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    lab.assert_hits_resume().await;
});

async fn old_snapshot(lab: &Lab) {
    let snapshot = lab.cluster.redis().snapshot().await.unwrap();
    for_a_while().await;
    lab.cluster.redis().restart_from(&snapshot).await.unwrap();
    for_a_while().await;
}

fault_test!(redis_restarts_from_an_old_snapshot, lab, {
    old_snapshot(&lab).await;
    lab.assert_hits_resume().await;
});

/// The replica stops following, writes go on, the primary dies, the replica takes its place.
async fn lagging_failover(lab: &Lab) {
    let replica = lab.cluster.other_redis().unwrap();
    replica
        .wait_caught_up_with(lab.cluster.redis())
        .await
        .unwrap();
    replica.freeze_replication().unwrap();
    for_a_while().await;
    lab.cluster.redis().kill().await.unwrap();
    replica.promote().await.unwrap();
    for node in lab.cluster.nodes() {
        node.redis().unwrap().retarget(replica.addr());
    }
    for_a_while().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_replaced_by_a_lagging_replica() {
    let lab = Arc::new(Lab::with_replica(Consistency::Strict, true).await);
    let under_test = lab.clone();
    let report = lab
        .under_load(async move {
            lagging_failover(&under_test).await;
            under_test.assert_hits_resume().await;
        })
        .await;
    report.assert_nothing_stale();
    report.assert_available();
}

/// For a while one node still talks to the old primary and the other to the promoted replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nodes_disagree_on_which_redis_is_the_primary() {
    let lab = Arc::new(Lab::with_replica(Consistency::Strict, true).await);
    let under_test = lab.clone();
    let report = lab
        .under_load(async move {
            let replica = under_test.cluster.other_redis().unwrap();
            replica.promote().await.unwrap();
            under_test.cluster.nodes()[1]
                .redis()
                .unwrap()
                .retarget(replica.addr());
            for_a_while().await;
            for_a_while().await;
            under_test.cluster.nodes()[0]
                .redis()
                .unwrap()
                .retarget(replica.addr());
            under_test.assert_hits_resume().await;
        })
        .await;
    report.assert_nothing_stale();
    assert_eq!(
        (report.failed_reads, report.failed_writes),
        (0, 0),
        "{report:?}"
    );
}

/// Requests fail while Postgres is away, but none is stale, and all is well afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_restarts() {
    let lab = Arc::new(Lab::new(Consistency::Strict).await);
    let under_test = lab.clone();
    let report = lab
        .under_load(async move {
            under_test.cluster.postgres().restart().await.unwrap();
            under_test.assert_hits_resume().await;
            for_a_while().await;
            under_test
                .cluster
                .postgres()
                .terminate_connections()
                .await
                .unwrap();
            for_a_while().await;
            under_test.assert_hits_resume().await;
        })
        .await;
    report.assert_nothing_stale();
}

/// A node dies between the announcement of a write and its end: nobody serves its key from the
/// cache until the intent lapses, and everybody reads the store meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_with_an_intent_open() {
    let lab = Arc::new(Lab::new(Consistency::Strict).await);
    let [a, b] = lab.pair();
    let id = lab.create(a).await;
    assert!(lab.put(a, &id, 1).await);
    assert_eq!(lab.get(b, &id).await.unwrap().0, 1);
    a.postgres().unwrap().stall_replies();
    let writer = tokio::spawn({
        let (lab, id) = (lab.clone(), id.clone());
        async move { lab.put(&lab.cluster.nodes()[0], &id, 2).await }
    });
    // The write has been made; its reply and the end of its intent have not.
    until("the write is in Postgres", PATIENCE, || async {
        let name = lab
            .cluster
            .postgres()
            .run(&format!("SELECT name FROM items WHERE id = '{id}'"))
            .await;
        name.ok().filter(|name| name.trim() == "2")
    })
    .await
    .unwrap();
    a.process().kill().await.unwrap();
    assert!(!writer.await.unwrap());
    let (number, cache) = lab.get(b, &id).await.unwrap();
    assert_eq!(number, 2, "{cache}");
    assert!(cache.contains("detail=intent"), "{cache}");
    until(
        "the intent lapses and the item is cached again",
        PATIENCE,
        || async {
            let (number, cache) = lab.get(b, &id).await?;
            assert_eq!(number, 2);
            cache.contains("hit").then_some(())
        },
    )
    .await
    .unwrap();
    let keys: Vec<String> = lab.cluster.redis().query(&["KEYS", "*"]).await.unwrap();
    println!("left in Redis: {keys:?}");
}

/// A node whose load is held up while another node writes: its fill must be refused.
async fn slow_fill(lab: &Arc<Lab>) -> (u64, u64) {
    let [a, b] = lab.pair();
    let id = lab.create(b).await;
    assert!(lab.put(b, &id, 1).await);
    let cleared = lab
        .client
        .post(format!("{}/cache/clear", b.url()))
        .send()
        .await
        .unwrap();
    assert_eq!(cleared.status(), StatusCode::OK);
    a.postgres().unwrap().stall_replies();
    let selects =
        "SELECT sum(calls) FROM pg_stat_statements WHERE query LIKE '%FROM items%id = $1%'";
    let before = lab.cluster.postgres().run(selects).await.unwrap();
    let reader = tokio::spawn({
        let (lab, id) = (lab.clone(), id.clone());
        async move { lab.get(&lab.cluster.nodes()[0], &id).await }
    });
    until("the load has read the old value", PATIENCE, || async {
        (lab.cluster.postgres().run(selects).await.ok()? != before).then_some(())
    })
    .await
    .unwrap();
    assert!(lab.put(b, &id, 2).await);
    a.postgres().unwrap().heal();
    let slow = reader.await.unwrap().unwrap().0;
    until("node a answers", PATIENCE, || lab.get(a, &id))
        .await
        .unwrap();
    let fresh = lab.get(b, &id).await.unwrap().0;
    (slow, fresh)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_fill_is_refused() {
    let lab = Arc::new(Lab::new(Consistency::Strict).await);
    let (_, fresh) = slow_fill(&lab).await;
    assert_eq!(fresh, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_textbook_is_caught_by_a_slow_fill() {
    let lab = Arc::new(Lab::new(Consistency::Textbook).await);
    let (slow, later) = slow_fill(&lab).await;
    assert_eq!(
        (slow, later),
        (1, 1),
        "the textbook pattern should have served the old value"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_textbook_is_caught_by_an_old_snapshot() {
    let lab = Arc::new(Lab::new(Consistency::Textbook).await);
    let under_test = lab.clone();
    let report = lab
        .under_load(async move { old_snapshot(&under_test).await })
        .await;
    report.assert_something_stale();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_textbook_is_caught_by_a_lagging_replica() {
    let lab = Arc::new(Lab::with_replica(Consistency::Textbook, true).await);
    let under_test = lab.clone();
    let report = lab
        .under_load(async move { lagging_failover(&under_test).await })
        .await;
    report.assert_something_stale();
}

//! The six endpoints of the examples `shop` and `shop_before`: both forms answer the same, and the first
//! has at most half the lines of the second. The selects are not counted: they are functions of the domain
//! that know nothing of the cache. With those that each form calls, the first would have 59 % of the lines.
#![allow(
    dead_code,
    clippy::duplicate_mod,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "both forms have the same domain, and a test fails by panicking and shows its figures"
)]

#[path = "../examples/shop.rs"]
mod after;
#[path = "../examples/shop_before.rs"]
mod before;
mod support;

use std::collections::BTreeMap;

use support::{Ground, Pair};
use uuid::Uuid;

/// Goes through all endpoints of one form.
macro_rules! walk {
    ($form:ident) => {{
        use $form::Shop;
        use $form::domain::{Error, Order, TABLES};

        let ground = Ground::new(Pair::RedisPostgres).await;
        let node = ground.node().await;
        let pool = ground.store.pool.clone().unwrap();
        pool.get()
            .await
            .unwrap()
            .batch_execute(TABLES)
            .await
            .unwrap();
        let cached = node.cached.clone();
        let shop = Shop { cached, pool };
        let (ada, bob) = (Uuid::now_v7(), Uuid::now_v7());

        assert_eq!(shop.get(ada).await.unwrap(), None);
        let written = shop.put(ada, "Ada".to_owned()).await.unwrap();
        assert_eq!(shop.get(ada).await.unwrap(), Some(written));
        shop.put(ada, "Ada L.".to_owned()).await.unwrap();
        assert_eq!(shop.get(ada).await.unwrap().unwrap().name, "Ada L.");

        assert_eq!(shop.list(ada, Uuid::nil(), 2).await.unwrap(), []);
        let mut orders = Vec::new();
        for cents in [100, 200, 300] {
            let id = Uuid::now_v7();
            let order = Order {
                id,
                account: ada,
                cents,
            };
            orders.push(shop.post(order).await.unwrap());
        }
        assert_eq!(shop.get(ada).await.unwrap().unwrap().spent, 600);
        assert_eq!(shop.list(ada, Uuid::nil(), 2).await.unwrap(), orders[..2]);
        assert_eq!(shop.list(ada, orders[1].id, 2).await.unwrap(), orders[2..]);

        // Refused in the middle of the transaction: nothing of it is left.
        let order = Order {
            id: Uuid::now_v7(),
            account: bob,
            cents: 1,
        };
        let refused = shop.post(order).await;
        assert!(matches!(refused, Err(Error::NoSuchAccount)), "{refused:?}");
        assert_eq!(shop.list(bob, Uuid::nil(), 2).await.unwrap(), []);
        // The same order once more.
        let again = shop.post(orders[0].clone()).await;
        assert!(matches!(again, Err(Error::Database(_))), "{again:?}");
        assert_eq!(shop.get(ada).await.unwrap().unwrap().spent, 600);

        shop.put(bob, "Bob".to_owned()).await.unwrap();
        let names = |accounts: Vec<Option<$form::domain::Account>>| {
            let name = |account: Option<$form::domain::Account>| account.map(|some| some.name);
            accounts.into_iter().map(name).collect::<Vec<_>>()
        };
        let nobody = Uuid::now_v7();
        let many = shop.batch(&[bob, nobody, ada]).await.unwrap();
        let expected = [Some("Bob".to_owned()), None, Some("Ada L.".to_owned())];
        assert_eq!(names(many), expected);

        assert!(shop.delete(bob).await.unwrap());
        assert!(!shop.delete(bob).await.unwrap());
        assert_eq!(shop.get(bob).await.unwrap(), None);
        assert_eq!(node.cached.stats().unguarded_writes, 0);
        assert_eq!(node.cached.stats().unannounced_writes, 0);
    }};
}

#[tokio::test]
async fn the_endpoints_do_what_they_say() {
    walk!(after);
}

#[tokio::test]
async fn the_endpoints_over_the_bare_guard_do_the_same() {
    walk!(before);
}

/// How many lines each endpoint has: from `pub async fn` to the brace that ends it.
fn lines(source: &str) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    let mut endpoint = None;
    for line in source.lines() {
        if let Some(rest) = line.strip_prefix("    pub async fn ") {
            endpoint = rest.split('(').next();
        }
        if let Some(name) = endpoint {
            *counts.entry(name).or_default() += 1;
        }
        if line == "    }" {
            endpoint = None;
        }
    }
    counts
}

#[test]
fn the_endpoints_have_at_most_half_the_lines_they_had() {
    let after = lines(include_str!("../examples/shop.rs"));
    let before = lines(include_str!("../examples/shop_before.rs"));
    assert!(after.keys().eq(before.keys()) && after.len() == 6);
    for (name, after) in &after {
        println!("{name}: {} lines before, {after} after", before[name]);
        assert!(*after <= before[name], "{name}");
    }
    let all = |counts: &BTreeMap<&str, usize>| counts.values().sum::<usize>();
    println!("all: {} before, {} after", all(&before), all(&after));
    assert!(all(&after) * 2 <= all(&before));
}

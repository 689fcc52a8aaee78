//! What the service asks of its Postgres, and what it does where it is not as it should be.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use support::{SAMPLE, Service, config, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use writethrough_service::config::{CacheBackend, Config, Database};
use writethrough_service::engine::Consistency;
use writethrough_service::item::PageRequest;
use writethrough_service::store::postgres::{Connector, Lasts, PostgresStore};
use writethrough_service::store::{ItemStore, StoreFailure};
use writethrough_testbed::{Postgres, Testbed};

/// What a pooler does that ignores the parameter `options` of the start of a session.
async fn pooler_that_drops_options(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(serve_without_options(client, server));
        }
    });
    address
}

async fn serve_without_options(mut client: TcpStream, server: SocketAddr) -> std::io::Result<()> {
    const SSL_REQUEST: [u8; 4] = 80_877_103_u32.to_be_bytes();
    let mut server = TcpStream::connect(server).await?;
    let start = loop {
        let length = client.read_u32().await? as usize;
        let mut start = vec![0; length - 4];
        client.read_exact(&mut start).await?;
        if !start.starts_with(&SSL_REQUEST) {
            break start;
        }
        client.write_all(b"N").await?;
    };
    let (version, parameters) = start.split_at(4);
    let texts: Vec<&[u8]> = parameters.split(|byte| *byte == 0).collect();
    let mut kept = version.to_vec();
    for pair in texts.chunks(2) {
        if let [name, value] = pair
            && !name.is_empty()
            && *name != b"options"
        {
            kept.extend([*name, b"\0", *value, b"\0"].concat());
        }
    }
    kept.push(0);
    server.write_u32(kept.len() as u32 + 4).await?;
    server.write_all(&kept).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

/// A pooler drops `options`, so nothing bounds a statement: a write that waits for a locked row commits
/// after its announcement has lapsed, and a stale value is served until the TTL.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_what_the_guarantee_rests_on_is_refused_with_the_remedy() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let pooler = pooler_that_drops_options(postgres.addr()).await;
    let url = postgres
        .url()
        .replace(&postgres.port().to_string(), &pooler.port().to_string());
    let connector = Connector::new(&url, "test").unwrap();
    let refused = async || {
        let pool = connector.pool(2).unwrap();
        let at_start = connector.connect().await.err().unwrap().to_string();
        let of_pool = pool.get().await.err().unwrap().to_string();
        assert!(of_pool.contains(&at_start), "{of_pool}");
        let store = PostgresStore::new(&connector, 1).unwrap();
        let of_store = store.ping().await.unwrap_err().to_string();
        assert!(of_store.contains(&at_start), "{of_store}");
        at_start
    };
    for (setting, wrong, right) in [
        ("statement_timeout", "0", "5s"),
        ("statement_timeout", "24s", "1s"),
        (
            "default_transaction_isolation",
            "serializable",
            "read committed",
        ),
    ] {
        let set = |value: &str| format!("ALTER ROLE labuser SET {setting} = '{value}'");
        postgres.run(&set(wrong)).await.unwrap();
        let reason = refused().await;
        let remedy = format!("ALTER ROLE the_role_of_the_url SET {setting}");
        assert!(
            reason.starts_with(setting) && reason.contains(&remedy),
            "{reason}"
        );
        postgres.run(&set(right)).await.unwrap();
    }
    connector.connect().await.unwrap();
    drop(connector.pool(1).unwrap().get().await.unwrap());

    let create =
        "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0";
    postgres.run(create).await.unwrap();
    let (server, _) = postgres
        .url()
        .rsplit_once('/')
        .map(|(a, b)| (a.to_owned(), b.len()))
        .unwrap();
    let latin = Connector::new(&format!("{server}/latin"), "test").unwrap();
    let reason = latin.connect().await.err().unwrap().to_string();
    assert!(reason.contains("server_encoding is LATIN1"), "{reason}");
}

const BODY: &str = r#"{"name": "Lamp", "price": 24.50}"#;

async fn ready(postgres: &Postgres, consistency: Consistency) -> Service {
    let service = Service::start(Config {
        consistency,
        ..config(Database::Postgres(postgres.url()), CacheBackend::InProcess)
    })
    .await;
    service.until_ready().await;
    if consistency == Consistency::Strict {
        return service.cached().await;
    }
    service
}

/// Every connection of the pool keeps a plan for the old type of the column.
#[tokio::test(flavor = "multi_thread")]
async fn a_column_whose_type_changes_costs_no_request() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let service = ready(&postgres, Consistency::Off).await;
    let path = service.create("Lamp").await;
    let all = async || {
        let requests = (0..8).map(|number| {
            let (client, path) = (service.client.clone(), path.clone());
            async move {
                let answer = match number % 3 {
                    0 => client.get(&path).await,
                    1 => client.get("/items").await,
                    _ => client.put(&path, BODY).await,
                };
                (answer.status.as_u16(), answer.text())
            }
        });
        for (status, text) in futures::future::join_all(requests).await {
            assert_eq!(status, 200, "{text}");
        }
    };
    for _ in 0..3 {
        all().await;
    }
    for digits in [12, 14] {
        let alter = format!("ALTER TABLE items ALTER price TYPE numeric({digits}, 2)");
        postgres.run(&alter).await.unwrap();
        all().await;
    }
    assert_eq!(service.post("/items", BODY).await.status, 201);
    service.running.shutdown().await;
}

/// A provider's guard of the disk does this; the server is still the primary.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_turns_read_only_still_answers_reads() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let read_only = async |value: &str| {
        let set = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
        postgres.run(&set).await.unwrap();
        postgres.run("SELECT pg_reload_conf()").await.unwrap();
    };
    for consistency in [Consistency::Off, Consistency::Strict] {
        let service = ready(&postgres, consistency).await;
        let sample = format!("/items/{SAMPLE}");
        read_only("on").await;
        let refused = until("writes are refused", async || {
            let answer = service.put(&sample, BODY).await;
            (answer.status != 200).then_some(answer)
        })
        .await;
        refused.problem(503, "unavailable");
        // New connections as well as old ones.
        postgres.terminate_connections().await.unwrap();
        let begun = Instant::now();
        service.put(&sample, BODY).await.problem(503, "unavailable");
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        for _ in 0..10 {
            assert_eq!(service.get(&sample).await.status, 200);
            assert_eq!(service.get("/items").await.status, 200);
        }
        assert_eq!(service.get("/readyz").await.status, 200);
        read_only("off").await;
        until("writes succeed", async || {
            (service.put(&sample, BODY).await.status == 200).then_some(())
        })
        .await;
        service.running.shutdown().await;
    }
}

/// Without its row, or without its schema, no epoch can be had until somebody mends it.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_epoch_row_a_write_is_refused_at_once() {
    for damage in [
        "DELETE FROM writethrough.epoch",
        "DROP SCHEMA writethrough CASCADE",
    ] {
        let testbed = Testbed::new().await.unwrap();
        let postgres = testbed.postgres().await.unwrap();
        let service = ready(&postgres, Consistency::Strict).await;
        let path = service.create("Lamp").await;
        postgres.run(damage).await.unwrap();
        for _ in 0..2 {
            let begun = Instant::now();
            service.put(&path, BODY).await.problem(503, "unavailable");
            assert!(
                begun.elapsed() < Duration::from_secs(2),
                "{:?}",
                begun.elapsed()
            );
            // The second time the poll has seen it, too.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(service.get(&path).await.status, 200);
        let connector = Connector::new(&postgres.url(), "test").unwrap();
        let mut client = connector.connect().await.unwrap();
        let at_start = PostgresStore::migrate(&mut client).await.unwrap_err();
        assert_eq!(at_start.lasts(), Lasts::ForGood);
        let at_start = at_start.to_string();
        assert!(at_start.contains("DROP TABLE"), "{at_start}");

        let remedy =
            "DROP SCHEMA IF EXISTS writethrough CASCADE; DROP TABLE writethrough_schema_history";
        postgres.run(remedy).await.unwrap();
        PostgresStore::migrate(&mut client).await.unwrap();
        until("writes succeed", async || {
            (service.put(&path, BODY).await.status == 200).then_some(())
        })
        .await;
        service.running.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_hangs_does_not_keep_the_others_from_being_used() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    // It accepts, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    let alive = postgres.addr();
    // No answer to a SYN: TEST-NET-1, RFC 5737.
    for dead in [
        format!("127.0.0.1:{silent_port}"),
        "192.0.2.1:5432".to_owned(),
    ] {
        let url = postgres
            .url()
            .replace(&alive.to_string(), &format!("{dead},{dead},{alive}"));
        let connector = Connector::new(&url, "test").unwrap();
        connector.connect().await.unwrap();
        let store = PostgresStore::new(&connector, 4).unwrap();
        until("the good host is found", async || {
            store.ping().await.is_ok().then_some(())
        })
        .await;
        // Remembered: no further connection waits for the dead ones.
        let begun = Instant::now();
        for _ in 0..10 {
            drop(connector.connect().await.unwrap());
        }
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "{:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_read_is_refused_and_takes_no_list_down() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let connector = Connector::new(&postgres.url(), "test").unwrap();
    let mut client = connector.connect().await.unwrap();
    PostgresStore::migrate(&mut client).await.unwrap();
    let insert = |time: &str| {
        format!(
            "INSERT INTO items (id, name, price, created_at, updated_at)
             VALUES (gen_random_uuid(), 'x', 1, {time}) RETURNING id"
        )
    };
    let wrong = [
        "'infinity', now()",
        "'-infinity', now()",
        "'10000-01-01 00:00:00+00', now()",
        "'0044-03-15 BC', now()",
        "now(), 'infinity'",
    ];
    for time in wrong {
        let refused = postgres.run(&insert(time)).await.unwrap_err().to_string();
        assert!(refused.contains("check constraint"), "{refused}");
    }
    // Rows of before the constraint.
    let columns = "created_at_can_be_shown, DROP CONSTRAINT updated_at_can_be_shown";
    let drop_it = format!("ALTER TABLE items DROP CONSTRAINT {columns}");
    postgres.run(&drop_it).await.unwrap();
    let store = PostgresStore::new(&connector, 2).unwrap();
    let whole = store
        .select_page(PageRequest {
            limit: 2,
            after: None,
        })
        .await
        .unwrap();
    for time in wrong {
        let id: String = postgres.run(&insert(time)).await.unwrap();
        let error = store
            .select(id.parse::<uuid::Uuid>().unwrap().into())
            .await
            .unwrap_err()
            .to_string();
        let column = if time.starts_with("now") {
            "updated_at"
        } else {
            "created_at"
        };
        assert!(error.contains(&id) && error.contains(column), "{error}");
    }
    let page = store
        .select_page(PageRequest {
            limit: 2,
            after: None,
        })
        .await
        .unwrap();
    assert_eq!(page, whole);
    let all = store
        .select_page(PageRequest {
            limit: 100,
            after: None,
        })
        .await
        .unwrap();
    assert_eq!(all.items.len(), 3);
}

/// A number that a scrape tells.
async fn metric(service: &Service, name: &str) -> f64 {
    let text = service.get("/metrics").await.text();
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit(' ').next());
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no {name}: {text}"))
}

/// Writes of a locked row took every connection, and nobody else got one.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_row_holds_up_nobody_else() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    for consistency in [Consistency::Off, Consistency::Strict] {
        let database = Database::Postgres(postgres.url());
        let service = Service::start(Config {
            consistency,
            database_pool_size: 16,
            ..config(database, CacheBackend::InProcess)
        })
        .await;
        until("the service is ready", async || {
            (service.get("/readyz").await.status == 200).then_some(())
        })
        .await;
        let locked = service.create("Locked").await;
        let mut others = Vec::new();
        for _ in 0..8 {
            others.push(service.create("Other").await);
        }
        let connector = Connector::new(&postgres.url(), "holder").unwrap();
        let mut holder = connector.connect().await.unwrap();
        let lock = holder.transaction().await.unwrap();
        let id = locked.rsplit('/').next().unwrap();
        let hold = format!("SELECT FROM items WHERE id = '{id}' FOR UPDATE");
        lock.batch_execute(&hold).await.unwrap();

        let writes = futures::future::join_all((0..44).map(|_| {
            let (client, path) = (service.client.clone(), locked.clone());
            async move { client.put(&path, BODY).await }
        }));
        let look = async {
            let held = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
            let held = until("a write waits for the lock", async || {
                let held: u32 = postgres.run(held).await.unwrap().parse().unwrap();
                (held > 0).then_some(held)
            })
            .await;
            assert!(held <= 3, "{held} connections wait for one row");
            for _ in 0..5 {
                let all = others.iter().map(async |path| {
                    for answer in [
                        service.put(path, BODY).await,
                        service.get(path).await,
                        service.get("/items?limit=7").await,
                    ] {
                        assert_eq!(answer.status, 200, "{}", answer.text());
                    }
                });
                futures::future::join_all(all).await;
            }
        };
        let begun = Instant::now();
        let (answers, ()) = tokio::join!(writes, look);
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
        for answer in answers {
            // Nothing was written, for certain.
            assert_eq!(answer.status, 503, "{}", answer.text());
            assert!(!answer.header("retry-after").is_empty());
            assert!(
                !answer.text().contains("outcome-unknown"),
                "{}",
                answer.text()
            );
        }
        // Without their turn, or with it and without one at the row.
        let unannounced = metric(&service, "writethrough_refused_writes_total").await;
        let refused = r#"db_client_refused_operations_total{reason="busy_row"}"#;
        assert!(metric(&service, refused).await + unannounced >= 40.0);
        lock.rollback().await.unwrap();
        assert_eq!(service.put(&locked, BODY).await.status, 200);
        service.running.shutdown().await;
    }
}

/// As many locked rows as there are connections: what is kept for reads is theirs.
#[tokio::test(flavor = "multi_thread")]
async fn reads_go_on_while_every_write_waits() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let service = ready(&postgres, Consistency::Off).await;
    let mut paths = Vec::new();
    for _ in 0..24 {
        paths.push(service.create("Lamp").await);
    }
    let connector = Connector::new(&postgres.url(), "holder").unwrap();
    let mut holder = connector.connect().await.unwrap();
    let lock = holder.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE items IN EXCLUSIVE MODE")
        .await
        .unwrap();
    let writes = futures::future::join_all(paths.iter().map(async |path| {
        let answer = service.put(path, BODY).await;
        assert_eq!(answer.status, 503, "{}", answer.text());
    }));
    let reads = async {
        until("writes wait for the lock", async || {
            let held = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
            (postgres.run(held).await.unwrap() == "6").then_some(())
        })
        .await;
        for _ in 0..5 {
            futures::future::join_all(paths.iter().map(async |path| {
                let answer = service.get(path).await;
                assert_eq!(answer.status, 200, "{}", answer.text());
            }))
            .await;
        }
    };
    tokio::join!(writes, reads);
    let refused = r#"db_client_refused_operations_total{reason="no_connection"}"#;
    assert!(metric(&service, refused).await >= 18.0);
    lock.rollback().await.unwrap();
    service.running.shutdown().await;
}

/// The pool tried to grow beyond what the server allows, and each attempt cost a request.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_cannot_grow_uses_the_connections_that_it_has() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let role = "CREATE ROLE few LOGIN CONNECTION LIMIT 8; ALTER DATABASE items_db OWNER TO few";
    postgres.run(role).await.unwrap();
    let database = Database::Postgres(postgres.url().replace("labuser@", "few@"));
    let service = Service::start(Config {
        database_pool_size: 16,
        ..config(database, CacheBackend::InProcess)
    })
    .await
    .cached()
    .await;
    let path = service.create("Lamp").await;
    let all = async || {
        let requests = (0..64).map(|number| {
            let (client, path) = (service.client.clone(), path.clone());
            async move {
                match number % 2 {
                    0 => client.get(&format!("/items?limit={}", number + 1)).await,
                    _ => client.put(&path, BODY).await,
                }
            }
        });
        futures::future::join_all(requests).await
    };
    for _ in 0..20 {
        for answer in all().await {
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
    }
    // From time to time it asks for one more.
    until("the limit and its reason are told", async || {
        all().await;
        let limit = metric(&service, "db_client_connections_limit").await;
        let health = service.get("/health").await.json();
        let reason = health["reason"].as_str().unwrap_or_default();
        let told = reason.contains("DATABASE_POOL_SIZE") && reason.contains("too many connections");
        ((4.0..=7.0).contains(&limit) && told && health["status"] == "ok").then_some(())
    })
    .await;

    // All connections go, and those for items come back first.
    postgres.terminate_connections().await.unwrap();
    until("the fence has its connection", async || {
        all().await;
        let health = service.get("/health").await.json();
        (health["status"] == "ok" && health["mode"] == "cached").then_some(())
    })
    .await;
    postgres
        .run("ALTER ROLE few CONNECTION LIMIT -1")
        .await
        .unwrap();
    until("there is room again", async || {
        all().await;
        let health = service.get("/health").await.json();
        health["reason"].is_null().then_some(())
    })
    .await;
    assert_eq!(metric(&service, "db_client_connections_limit").await, 16.0);
    service.running.shutdown().await;
}

/// Another node holds all connections that the server allows.
#[tokio::test(flavor = "multi_thread")]
async fn without_any_connection_the_reason_and_the_setting_are_told() {
    let testbed = Testbed::new().await.unwrap();
    let postgres = testbed.postgres().await.unwrap();
    let role = "CREATE ROLE few LOGIN CONNECTION LIMIT 3; ALTER DATABASE items_db OWNER TO few";
    postgres.run(role).await.unwrap();
    let url = postgres.url().replace("labuser@", "few@");
    let connector = Connector::new(&url, "test").unwrap();
    PostgresStore::migrate(&mut connector.connect().await.unwrap())
        .await
        .unwrap();
    let mut holders = Vec::new();
    for _ in 0..3 {
        let held = until("one is had", async || connector.connect().await.ok()).await;
        holders.push(held);
    }
    let store = PostgresStore::new(&connector, 4).unwrap();
    let id = SAMPLE.parse::<uuid::Uuid>().unwrap().into();
    let begun = Instant::now();
    let error = store.select(id).await.unwrap_err();
    assert!(
        begun.elapsed() < Duration::from_millis(1500),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(error.failure(), StoreFailure::Overloaded);
    assert!(error.to_string().contains("DATABASE_POOL_SIZE"), "{error}");
    // It answers.
    store.ping().await.unwrap();
    holders.pop();
    until("a connection is had", async || store.select(id).await.ok()).await;
}

//! The six endpoints of the example `shop` as they are written over the bare guard: the statement that
//! carries it, whose transaction, and what each error says about the effect.
//! `cargo run -p writethrough --example shop_before -- POSTGRES_URL REDIS_URL`
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::print_stdout,
    reason = "a program whose output is its purpose"
)]

#[path = "shop/domain.rs"]
pub mod domain;

use deadpool_postgres::{Manager, Pool};
use domain::{Account, Error, Order, TABLES, account, orders};
use futures::future::join_all;
use tokio_postgres::{IsolationLevel, NoTls};
use uuid::Uuid;
use writethrough::postgres::op_error;
use writethrough::writing::Guarded;
use writethrough::{
    Collection, Entity, OpError, PostgresFence, RedisCache, RedisSettings, WriteThrough,
};

const ACCOUNT: Entity<Uuid, Account> = Entity::new("account");
const ORDER: Entity<Uuid, Order> = Entity::new("order");
const ORDERS_OF: Collection<Uuid, Vec<Order>> = Collection::new("orders_of");

const PUT: &str = "INSERT INTO account (id, name, spent) \
                   SELECT $2, $3, 0 FROM writethrough.guard($1) \
                   ON CONFLICT (id) DO UPDATE SET name = $3 RETURNING id, name, spent";
const DELETE: &str = "DELETE FROM account USING writethrough.guard($1) WHERE id = $2";
const SPEND: &str = "UPDATE account SET spent = spent + $2 WHERE id = $1 \
                     RETURNING id, name, spent";
const INSERT: &str = "INSERT INTO orders (id, account, cents) VALUES ($1, $2, $3)";

/// Of a connection that could not be had, and of what is sent before COMMIT.
fn without_effect(error: impl Into<Error>) -> OpError<Error> {
    OpError::Rejected(error.into())
}

/// Of what may have committed.
fn of_statement(error: tokio_postgres::Error) -> OpError<Error> {
    op_error(error).map(Error::from)
}

#[derive(Clone)]
pub struct Shop {
    pub cached: WriteThrough,
    pub pool: Pool,
}

impl Shop {
    pub async fn get(&self, id: Uuid) -> Result<Option<Account>, Error> {
        let load = || account(&self.pool, id);
        Ok(self.cached.read(&ACCOUNT.key(id), load).await?.value)
    }

    pub async fn put(&self, id: Uuid, name: String) -> Result<Account, Error> {
        let pool = self.pool.clone();
        let op = move |mut guard: Guarded, slot, ()| {
            let (pool, name) = (pool.clone(), name.clone());
            async move {
                let client = pool.get().await.map_err(without_effect)?;
                let statement = client.prepare_cached(PUT).await.map_err(without_effect)?;
                let row = client
                    .query_one(&statement, &[&guard.parameter(), &id, &name])
                    .await
                    .map_err(of_statement)?;
                let account = Account::from(row);
                guard.cache(&slot, &account);
                Ok(guard.commit(account))
            }
        };
        let written = self.cached.write(ACCOUNT.key(id)).guarded(op).await?;
        Ok(written.output)
    }

    pub async fn delete(&self, id: Uuid) -> Result<bool, Error> {
        let pool = self.pool.clone();
        let op = move |mut guard: Guarded, slot, ()| {
            let pool = pool.clone();
            async move {
                let client = pool.get().await.map_err(without_effect)?;
                let statement = client
                    .prepare_cached(DELETE)
                    .await
                    .map_err(without_effect)?;
                let count = client
                    .execute(&statement, &[&guard.parameter(), &id])
                    .await
                    .map_err(of_statement)?;
                guard.absent(&slot);
                Ok(guard.commit(count > 0))
            }
        };
        let written = self.cached.write(ACCOUNT.key(id)).guarded(op).await?;
        Ok(written.output)
    }

    pub async fn post(&self, order: Order) -> Result<Order, Error> {
        let Order { id, account, cents } = order;
        let changes = (ACCOUNT.key(account), ORDER.key(id), ORDERS_OF.of(account));
        let pool = self.pool.clone();
        let op = move |mut guard: Guarded, (payer, slot, ()), ()| {
            let (pool, order) = (pool.clone(), order.clone());
            async move {
                let mut client = pool.get().await.map_err(without_effect)?;
                let tx = client
                    .build_transaction()
                    .isolation_level(IsolationLevel::ReadCommitted)
                    .start()
                    .await
                    .map_err(without_effect)?;
                tx.batch_execute("SET LOCAL statement_timeout = '5s'")
                    .await
                    .map_err(without_effect)?;
                let statement = tx
                    .prepare_cached("SELECT writethrough.guard($1)")
                    .await
                    .map_err(without_effect)?;
                tx.execute(&statement, &[&guard.parameter()])
                    .await
                    .map_err(of_statement)?;
                let statement = tx.prepare_cached(SPEND).await.map_err(without_effect)?;
                let spent = tx
                    .query_opt(&statement, &[&account, &cents])
                    .await
                    .map_err(without_effect)?
                    .map(Account::from)
                    .ok_or(OpError::Rejected(Error::NoSuchAccount))?;
                let statement = tx.prepare_cached(INSERT).await.map_err(without_effect)?;
                tx.execute(&statement, &[&id, &account, &cents])
                    .await
                    .map_err(without_effect)?;
                tx.commit().await.map_err(of_statement)?;
                guard.cache(&payer, &spent);
                guard.cache(&slot, &order);
                Ok(guard.commit(order))
            }
        };
        Ok(self.cached.write(changes).guarded(op).await?.output)
    }

    pub async fn list(&self, of: Uuid, after: Uuid, limit: i64) -> Result<Vec<Order>, Error> {
        let (list, page) = (ORDERS_OF.of(of), format!("after={after}&limit={limit}"));
        let load = || orders(&self.pool, of, after, limit);
        let read = self.cached.read_page(&list, &page, load).await?;
        Ok(read.value.unwrap_or_default())
    }

    pub async fn batch(&self, ids: &[Uuid]) -> Result<Vec<Option<Account>>, Error> {
        let mut accounts = Vec::with_capacity(ids.len());
        for some in ids.chunks(16) {
            let reads = some.iter().map(|id| self.get(*id));
            accounts.extend(
                join_all(reads)
                    .await
                    .into_iter()
                    .collect::<Result<Vec<_>, _>>()?,
            );
        }
        Ok(accounts)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: EXAMPLE POSTGRES_URL REDIS_URL";
    let (postgres, redis) = (
        arguments.next().ok_or(usage)?,
        arguments.next().ok_or(usage)?,
    );
    let pool = Pool::builder(Manager::new(postgres.parse()?, NoTls)).build()?;
    let mut client = pool.get().await?;
    PostgresFence::migrate(&mut client).await?;
    client.batch_execute(TABLES).await?;
    drop(client);
    let cache = RedisCache::connect(RedisSettings::new(redis))?;
    let cached = WriteThrough::builder(cache, PostgresFence::new(pool.clone())).start()?;
    let shop = Shop { cached, pool };

    let (id, account) = (Uuid::now_v7(), Uuid::now_v7());
    println!("{:?}", shop.put(account, "Ada".to_owned()).await?);
    let cents = 450;
    println!("{:?}", shop.post(Order { id, account, cents }).await?);
    println!("{:?}", shop.get(account).await?);
    println!("{:?}", shop.list(account, Uuid::nil(), 10).await?);
    println!("{:?}", shop.delete(account).await?);
    println!("{:?}", shop.batch(&[account]).await?);
    shop.cached.shutdown().await;
    Ok(())
}

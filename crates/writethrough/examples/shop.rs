//! Six endpoints of a shop: get, put and delete an account, post an order (two values and a list in one
//! transaction), list orders page by page, and get many accounts at once.
//! `cargo run -p writethrough --example shop -- POSTGRES_URL REDIS_URL`
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::print_stdout,
    reason = "a program whose output is its purpose"
)]

#[path = "shop/domain.rs"]
pub mod domain;

use deadpool_postgres::{Manager, Pool};
use domain::{Account, Error, Order, TABLES, account, accounts, orders};
use tokio_postgres::NoTls;
use uuid::Uuid;
use writethrough::postgres::{Statement, Transaction};
use writethrough::{Collection, Entity, PostgresFence, RedisCache, RedisSettings, WriteThrough};

const ACCOUNT: Entity<Uuid, Account> = Entity::new("account");
const ORDER: Entity<Uuid, Order> = Entity::new("order");
const ORDERS_OF: Collection<Uuid, Vec<Order>> = Collection::new("orders_of");

const PUT: &str = "INSERT INTO account (id, name, spent) VALUES ($1, $2, 0) \
                   ON CONFLICT (id) DO UPDATE SET name = $2 RETURNING id, name, spent";
const DELETE: &str = "DELETE FROM account WHERE id = $1";
const SPEND: &str = "UPDATE account SET spent = spent + $2 WHERE id = $1 \
                     RETURNING id, name, spent";
const INSERT: &str = "INSERT INTO orders (id, account, cents) VALUES ($1, $2, $3)";

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
        let write = self.cached.write(ACCOUNT.key(id)).with(name);
        let op = move |statement: Statement, slot, name: String| async move {
            let (row, mut done) = statement.query_one(PUT, &[&id, &name]).await?;
            let account = Account::from(row);
            done.cache(&slot, &account);
            Ok(done.commit(account))
        };
        Ok(write.statement(&self.pool, op).await?.output)
    }

    pub async fn delete(&self, id: Uuid) -> Result<bool, Error> {
        let op = move |statement: Statement, slot, ()| async move {
            let (count, mut done) = statement.execute(DELETE, &[&id]).await?;
            done.absent(&slot);
            Ok(done.commit(count > 0))
        };
        let write = self.cached.write(ACCOUNT.key(id));
        Ok(write.statement(&self.pool, op).await?.output)
    }

    pub async fn post(&self, order: Order) -> Result<Order, Error> {
        let Order { id, account, cents } = order;
        let op = move |mut tx: Transaction, (payer, slot, ()), order: Order| async move {
            let spent = tx.query_opt(SPEND, &[&account, &cents]).await?;
            let spent = spent.map(Account::from).ok_or(Error::NoSuchAccount)?;
            tx.execute(INSERT, &[&id, &account, &cents]).await?;
            tx.cache(&payer, &spent);
            tx.cache(&slot, &order);
            Ok(tx.commit(order))
        };
        let changes = (ACCOUNT.key(account), ORDER.key(id), ORDERS_OF.of(account));
        let write = self.cached.write(changes).with(order);
        Ok(write.transaction(&self.pool, op).await?.output)
    }

    pub async fn list(&self, of: Uuid, after: Uuid, limit: i64) -> Result<Vec<Order>, Error> {
        let (list, page) = (ORDERS_OF.of(of), format!("after={after}&limit={limit}"));
        let load = || orders(&self.pool, of, after, limit);
        let read = self.cached.read_page(&list, &page, load).await?;
        Ok(read.value.unwrap_or_default())
    }

    pub async fn batch(&self, ids: &[Uuid]) -> Result<Vec<Option<Account>>, Error> {
        let load = |missing| accounts(&self.pool, missing);
        let found = self.cached.read_many(&ACCOUNT, ids, load).await?.values;
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
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

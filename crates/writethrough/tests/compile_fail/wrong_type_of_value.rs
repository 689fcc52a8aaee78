//! A value of another type than the entity has.

use deadpool_postgres::Pool;
use writethrough::WriteThrough;
use writethrough::Entity;

const PRICE: Entity<str, u64> = Entity::new("price");

async fn write(cached: &WriteThrough, pool: &Pool) {
    let write = cached.write(PRICE.key("tea"));
    let _ = write.transaction(pool, |mut transaction, price, ()| async move {
        transaction.cache(&price, &"five hundred".to_owned());
        Ok::<_, tokio_postgres::Error>(transaction.commit(()))
    });
}

fn main() {}

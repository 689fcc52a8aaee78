//! A value under a key that is not in the set of the write.

use deadpool_postgres::Pool;
use writethrough::WriteThrough;
use writethrough::Entity;

const PRICE: Entity<str, u64> = Entity::new("price");

async fn write(cached: &WriteThrough, pool: &Pool) {
    let write = cached.write(PRICE.key("tea"));
    let _ = write.transaction(pool, |mut transaction, _tea, ()| async move {
        transaction.cache(&PRICE.key("coffee"), &500);
        Ok::<_, tokio_postgres::Error>(transaction.commit(()))
    });
}

fn main() {}

//! An operation that forgets its commit.

use deadpool_postgres::Pool;
use writethrough::WriteThrough;
use writethrough::Entity;

const PRICE: Entity<str, u64> = Entity::new("price");

async fn write(cached: &WriteThrough, pool: &Pool) {
    let write = cached.write(PRICE.key("tea"));
    let _ = write.transaction(pool, |transaction, _, ()| async move {
        transaction.execute("UPDATE prices SET cents = 500", &[]).await
    });
}

fn main() {}

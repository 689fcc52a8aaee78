//! A commit that does not come from a guarded transaction.

use deadpool_postgres::Pool;
use writethrough::WriteThrough;
use writethrough::Entity;
use writethrough::writing::Commit;

const PRICE: Entity<str, u64> = Entity::new("price");

async fn write(cached: &WriteThrough, pool: &Pool) {
    let write = cached.write(PRICE.key("tea")).with(pool.clone());
    let _ = write.transaction(pool, |_, _, pool: Pool| async move {
        let client = pool.get().await.unwrap();
        client.execute("UPDATE prices SET cents = 500", &[]).await?;
        Ok::<_, tokio_postgres::Error>(Commit::new(500))
    });
}

fn main() {}

//! A name that could not be told from the rest of a key.

use writethrough::Entity;

const NAMELESS: Entity<str, u64> = Entity::new("");

fn main() {
    let _ = NAMELESS.key("tea");
}

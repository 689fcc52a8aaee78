//! What does not compile: the mistakes of a write that would otherwise show in the cache alone.

#[test]
fn mistakes_of_a_write_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}

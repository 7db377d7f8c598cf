//! Writes the identity of the core into the build: a worker refuses orders of another one.

include!("../scripts/core_identity.rs");

fn main() {
    println!("cargo::rerun-if-changed=../scripts/core_identity.rs");
    println!("cargo::rustc-env=HGCT_CORE={}", core_identity());
}

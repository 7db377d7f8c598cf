//! Plans of whole instances, their text, their errors.

use super::fixture::Shape;
use crate::{Budget, plan};

#[test]
fn four_kinds_show() {
    let instance = Shape::four_kinds().build();
    let planned = plan(&instance.input(), &Budget::default()).unwrap();
    println!("{}", planned.explanation);
}

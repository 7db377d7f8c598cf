//! Where a search begins that cannot be ended, and what a wish for kinds costs.

use hgct_core::job::MinKinds;

use super::fixture::{Instance, Shape, mix};
use super::plans::{check, planned};
use crate::estimate::measured;
use crate::instance::Rules;
use crate::wide::{Effort, find};
use crate::{Budget, MeasuredInput, executable, plan};

/// Twelve unlike devices: more than a small budget can look at.
fn unlike(seed: u64) -> Instance {
    let num = 12;
    let slowness: Vec<u64> = (0..num).map(|at| 1000 + mix(seed, 1 + at) % 3000).collect();
    let kinds = (0..num as u32).collect();
    Shape { slowness, kinds, seed, ..Shape::four_kinds() }.build()
}

#[test]
fn a_search_that_cannot_end_is_no_worse_than_the_layout_of_the_search_over_pools() {
    for seed in 0..3 {
        let documents = unlike(seed);
        let Instance { model, cluster, profile, .. } = &documents;
        let instance = measured(cluster, profile, model, 64, Rules::executable()).unwrap();
        let budget = Budget { nodes: 400_000, simulations: 40, stop: None };
        let effort = Effort { nodes: budget.nodes, stop: None };
        let (layout, _) = find(&instance, None, &effort).unwrap().best.unwrap();
        let input = MeasuredInput { model, cluster, profile };
        let executed = executable(&input, &instance, &layout).unwrap();
        let found = plan(&documents.input(), &budget).unwrap();
        check(&documents, &found);
        // One pricing decides: the plan that is built of the layout carries it too.
        assert_eq!(executed.plan.prediction.as_ref().unwrap().step_ns, executed.explanation.step_ns);
        assert!(
            found.explanation.step_ns <= executed.explanation.step_ns,
            "seed {seed}: {} ns beside the layout's {} ns",
            found.explanation.step_ns,
            executed.explanation.step_ns
        );
        assert!(!found.explanation.search.finished);
    }
}

/// A device that was measured at a fortieth of its speed, as one was whose framework had no fast
/// kernels: its kind is to count, which doubles the step, and the plan says so.
#[test]
fn what_a_wish_for_kinds_costs_is_told() {
    let shape = Shape {
        slowness: vec![1000, 1150, 1900, 40_000],
        num_layers: 4,
        global_batch: 32,
        ..Shape::four_kinds()
    };
    let mut instance = shape.build();
    let free = planned(&instance);
    instance.job.policy.min_kinds = MinKinds::All;
    let asked = planned(&instance);
    assert!(asked.explanation.step_ns as f64 > 1.3 * free.explanation.step_ns as f64);
    let row = asked.explanation.rejected.iter().find(|row| row.name == "without min_kinds").unwrap();
    assert_eq!(row.step_ns, Some(free.explanation.step_ns));
    assert!(free.explanation.rejected.iter().all(|row| row.name != "without min_kinds"));
}

//! The search against a naive enumeration of everything.

use std::collections::BTreeSet;

use super::fixture::{Instance, Shape, mix};
use crate::choices::{Choice, Request, choices};
use crate::evaluate::Sketch;
use crate::fleet::{Fleet, Task};
use crate::search::{Space, search};
use crate::{Budget, plan};

/// Every sketch of an instance: all ways to divide its devices, one by one, into pipelines; all
/// choices of each; all distributions.
fn all_sketches(fleet: &Fleet<'_>) -> BTreeSet<Sketch> {
    let mut sketches = BTreeSet::new();
    let mut pipelines: Vec<Vec<usize>> = Vec::new();
    divide(fleet, 0, &mut pipelines, &mut sketches);
    sketches
}

fn divide(fleet: &Fleet<'_>, device: usize, pipelines: &mut Vec<Vec<usize>>, out: &mut BTreeSet<Sketch>) {
    if device == fleet.devices.len() {
        if !pipelines.is_empty() {
            let all: Vec<Vec<Choice>> = pipelines.iter().map(|p| choices_of(fleet, p)).collect();
            combine(&all, fleet.global_batch, &mut Vec::new(), out);
        }
        return;
    }
    divide(fleet, device + 1, pipelines, out);
    for at in 0..pipelines.len() {
        pipelines[at].push(device);
        divide(fleet, device + 1, pipelines, out);
        pipelines[at].pop();
    }
    pipelines.push(vec![device]);
    divide(fleet, device + 1, pipelines, out);
    pipelines.pop();
}

fn choices_of(fleet: &Fleet<'_>, devices: &[usize]) -> Vec<Choice> {
    let count = |c: usize| devices.iter().filter(|d| fleet.classes[c].devices.contains(d)).count() as u8;
    let set: Vec<u8> = (0..fleet.classes.len()).map(count).collect();
    let request = Request { set: &set, step_ns: u64::MAX / 4, need: 0, first_only: false };
    choices(fleet, &request, &mut u64::MAX.clone()).unwrap()
}

fn combine(all: &[Vec<Choice>], left: u32, parts: &mut Vec<(Choice, u32)>, out: &mut BTreeSet<Sketch>) {
    if parts.len() == all.len() {
        if left == 0 {
            out.insert(Sketch::new(parts.clone()));
        }
        return;
    }
    for choice in &all[parts.len()] {
        for num in 1..=(left / choice.micro_batch) {
            parts.push((choice.clone(), num));
            combine(all, left - num * choice.micro_batch, parts, out);
            parts.pop();
        }
    }
}

/// Small instances of many forms.
fn small(seed: u64) -> Instance {
    let draw = |what: u64, most: u64| mix(seed, what) % most;
    let num = 1 + draw(0, 3) as usize;
    let kinds: Vec<u32> = (0..num).map(|d| draw(10 + d as u64, 3) as u32).collect();
    Shape {
        num_layers: 1 + draw(1, 3) as u32,
        global_batch: 2 + draw(2, 5) as u32,
        sizes: if draw(3, 2) == 0 { vec![1] } else { vec![1, 2] },
        slowness: kinds.iter().map(|k| [1000, 1700, 3500][*k as usize]).collect(),
        kinds,
        tied: draw(4, 2) == 0,
        seed,
    }
    .build()
}

#[test]
fn the_search_finds_what_brute_force_finds_and_its_bound_holds() {
    for seed in 0..60 {
        let instance = small(seed);
        let input = instance.input();
        let fleet = Fleet::new(Task::from(&input)).unwrap();
        let mut fastest = u64::MAX;
        for sketch in all_sketches(&fleet) {
            let Some(found) = sketch.evaluate(&fleet).unwrap() else { continue };
            let least = sketch.least_ns(&fleet);
            assert!(least <= found.step_ns, "seed {seed}: bound {least} of {sketch:?} is {}", found.step_ns);
            fastest = fastest.min(found.step_ns);
        }
        let space = Space { counts: fleet.counts(), data_parallel: false, one_pipeline: false, min_kinds: 0 };
        let outcome = search(&fleet, &space, None, &Budget::UNLIMITED).unwrap();
        assert!(outcome.finished);
        assert_eq!(outcome.best.unwrap().step_ns, fastest, "seed {seed}");
        let planned = plan(&input, &Budget::UNLIMITED).unwrap();
        assert_eq!(planned.explanation.step_ns, fastest, "seed {seed}");
    }
}

#![allow(clippy::unwrap_used, reason = "tests")]

use hgct_core::schedule::Operation;
use proptest::prelude::*;

use super::*;
use crate::instance::{
    CostRow, Exchange, ExpertClass, Rules, Schedule, Stage, Template, Transfer, Update, price,
};
use crate::tables::parse_device_counts;
use crate::tables::tests::tables;
use crate::wide::{Effort, replan};

fn instance(rules: Rules, global_batch: u32) -> Instance {
    let devices = parse_device_counts("FAST=8,SLOW=8").unwrap();
    Instance { rules, ..tables().instance("tiny", &devices, global_batch).unwrap() }
}

fn rules(transfer: Transfer, overlap: f64) -> Rules {
    Rules {
        transfer,
        exchange: Exchange::Hierarchical,
        exchange_overlap: overlap,
        update: Update::AllLayers,
        max_replicas: 2,
        schedules: vec![Schedule::Interleaved(2), Schedule::Interleaved(4), Schedule::ZeroBubble],
        ..Rules::hierarchical()
    }
}

fn template(count: u32, num: u32, schedule: Schedule, stages: &[(u32, u32, usize)]) -> Template {
    let stage = |(first_layer, end_layer, pool): &(u32, u32, usize)| Stage {
        first_layer: *first_layer,
        end_layer: *end_layer,
        pool: *pool,
        tensor_parallel: 2,
        expert_parallel: 1,
        replicas: 1,
        recompute: false,
    };
    Template {
        count,
        micro_batch: 1,
        num_micro_batches: num,
        schedule,
        stages: stages.iter().map(stage).collect(),
    }
}

fn layout(templates: Vec<Template>) -> Layout {
    Layout { templates, shard_optimizer: false }
}

fn plain() -> WhatIf {
    WhatIf::default()
}

const ONE: Schedule = Schedule::OneForwardOneBackward;

#[test]
fn without_waiting_it_takes_what_it_is_priced() {
    // One stage: no transfers, no bubble. Two pipelines exchange.
    let layout = layout(vec![template(2, 8, ONE, &[(0, 4, 0)])]);
    for rules in [Rules::published(), rules(Transfer::Overlapped, 0.0)] {
        let instance = instance(rules, 16);
        let simulated = simulate_layout(&instance, &layout, &plain()).unwrap();
        let priced = price(&instance, &layout).iteration_s;
        assert!((simulated.step_ns as f64 / 1e9 - priced).abs() < 1e-7, "{} {priced}", simulated.step_ns);
    }
}

#[test]
fn divided_experts_take_what_they_are_priced() {
    let mut instance = instance(rules(Transfer::Overlapped, 0.0), 16);
    for class in &mut instance.classes {
        class.experts = Some(ExpertClass {
            gradient_bytes: class.gradient_bytes / 2.0,
            parameter_bytes: class.parameter_bytes / 2.0,
            state_bytes: class.memory[0].state_bytes / 2.0,
            optimizer_bytes: class.memory[0].optimizer_bytes / 2.0,
        });
    }
    for pool in &mut instance.pools {
        let alone: Vec<CostRow> = pool.costs.iter().filter(|row| row.tensor_parallel == 1).cloned().collect();
        pool.costs.extend(alone.into_iter().map(|row| CostRow { expert_parallel: 2, ..row }));
    }
    let divided = |stages| {
        let mut of = Template { micro_batch: 2, ..template(2, 4, ONE, stages) };
        for stage in &mut of.stages {
            (stage.tensor_parallel, stage.expert_parallel) = (1, 2);
        }
        Layout { templates: vec![of], shard_optimizer: true }
    };
    let one = divided(&[(0, 4, 0)]);
    let simulated = simulate_layout(&instance, &one, &plain()).unwrap();
    let priced = price(&instance, &one).iteration_s;
    assert!((simulated.step_ns as f64 / 1e9 - priced).abs() < 1e-7, "{} {priced}", simulated.step_ns);
    // A rank a group, over two devices each.
    assert_eq!(simulated.timeline.ranks.len(), 2);
    let two = simulate_layout(&instance, &divided(&[(0, 2, 0), (2, 4, 1)]), &plain()).unwrap();
    assert!(two.roofline_ns <= two.step_ns && two.step_ns <= two.serial_ns);
}

#[test]
fn a_timeline_has_every_computation_once_and_in_order() {
    let instance = instance(rules(Transfer::Overlapped, 1.0), 16);
    for (schedule, per_micro_batch) in [(ONE, 2), (Schedule::ZeroBubble, 3), (Schedule::Interleaved(2), 4)] {
        let layout = layout(vec![template(2, 8, schedule, &[(0, 2, 1), (2, 4, 0)])]);
        let simulated = simulate_layout(&instance, &layout, &plain()).unwrap();
        assert_eq!(simulated.timeline.ranks.len(), 4);
        for rank in &simulated.timeline.ranks {
            let compute = rank.actions.iter().filter(|span| span.action.operation.is_compute());
            assert_eq!(compute.count(), 8 * per_micro_batch, "{schedule:?}");
            let mut end = 0;
            for span in rank.actions.iter().filter(|span| span.action.operation.is_compute()) {
                assert!(span.start_ns >= end, "{schedule:?}: two at once");
                end = span.end_ns;
            }
            for operation in [Operation::Reduce, Operation::Update] {
                assert!(rank.actions.iter().any(|span| span.action.operation == operation));
            }
        }
        // Micro-batches of the second pipeline have ids of their own.
        let ids = |rank: usize| {
            let of = &simulated.timeline.ranks[rank].actions;
            of.iter()
                .filter(|span| span.action.operation.is_compute())
                .map(|span| span.action.micro_batch)
                .max()
        };
        assert_eq!((ids(0), ids(2)), (Some(7), Some(15)));
        assert_eq!(simulated, simulate_layout(&instance, &layout, &plain()).unwrap());
    }
}

#[test]
fn schedules_that_promise_a_smaller_bubble_have_one() {
    let instance = instance(rules(Transfer::Overlapped, 0.0), 8);
    let step = |schedule| {
        let layout = layout(vec![template(1, 8, schedule, &[(0, 2, 0), (2, 4, 0)])]);
        simulate_layout(&instance, &layout, &plain()).unwrap().pipeline_ns
    };
    assert!(step(Schedule::Interleaved(2)) < step(ONE));
    assert!(step(Schedule::ZeroBubble) < step(ONE));
}

#[test]
fn zero_bubbles_are_priced_at_what_their_memory_allows() {
    // Alike stages and no exchange. The price has one pace for all; the simulator plays the order.
    let instance = instance(rules(Transfer::Overlapped, 0.0), 16);
    let stages = [(0, 1, 0), (1, 2, 0), (2, 3, 0), (3, 4, 0)];
    for recompute in [false, true] {
        let mut of = template(1, 16, Schedule::ZeroBubble, &stages);
        of.stages.iter_mut().for_each(|stage| stage.recompute = recompute);
        let layout = layout(vec![of]);
        let simulated = simulate_layout(&instance, &layout, &plain()).unwrap().pipeline_ns as f64 / 1e9;
        let priced = price(&instance, &layout).templates[0].total_s;
        assert!((simulated / priced - 1.0).abs() < 0.05, "{recompute}: {simulated} {priced}");
    }
}

#[test]
fn overlap_hides_exchange_and_series_hides_nothing() {
    let layout = layout(vec![template(2, 8, ONE, &[(0, 2, 0), (2, 4, 1)])]);
    let step = |transfer, overlap| {
        simulate_layout(&instance(rules(transfer, overlap), 16), &layout, &plain()).unwrap().step_ns
    };
    assert!(step(Transfer::Overlapped, 1.0) < step(Transfer::Overlapped, 0.0));
    assert!(step(Transfer::Overlapped, 0.0) < step(Transfer::Serial, 0.0));
}

#[test]
fn pipelines_that_share_a_port_wait_for_it() {
    // Groups of one device: two pipelines a node send over its port at the same moments.
    let mut templates = vec![template(4, 8, ONE, &[(0, 2, 0), (2, 4, 1)])];
    for stage in &mut templates[0].stages {
        stage.tensor_parallel = 1;
    }
    let shared =
        simulate_layout(&instance(rules(Transfer::Overlapped, 0.0), 32), &layout(templates), &plain());
    assert!(shared.unwrap().contention_ns > 0);
    let alone = layout(vec![template(1, 8, ONE, &[(0, 2, 0), (2, 4, 1)])]);
    let alone = simulate_layout(&instance(rules(Transfer::Overlapped, 0.0), 8), &alone, &plain()).unwrap();
    assert_eq!(alone.contention_ns, 0);
}

#[test]
fn a_slow_device_slows_only_who_waits_for_it() {
    let instance = instance(rules(Transfer::Overlapped, 0.0), 16);
    let layout = layout(vec![template(2, 8, ONE, &[(0, 4, 0)])]);
    let step = |slow: &[(&str, f64)]| {
        let slow = slow.iter().map(|(name, factor)| ((*name).to_owned(), *factor)).collect();
        simulate_layout(&instance, &layout, &WhatIf { slow, lose: vec![] })
    };
    let usual = step(&[]).unwrap();
    let slowed = step(&[("FAST-1/1", 1.3)]).unwrap();
    assert_eq!(slowed.roofline_ns, step(&[("FAST-1", 1.3)]).unwrap().roofline_ns);
    assert!((slowed.pipeline_ns as f64 / usual.pipeline_ns as f64 - 1.3).abs() < 1e-6);
    assert_eq!(step(&[("FAST-2", 1.3)]).unwrap(), usual);
    assert_eq!(step(&[("FAST", 2.0)]).unwrap().pipeline_ns, 2 * usual.pipeline_ns);
    for (name, factor, says) in [
        ("FAST-9", 1.3, "FAST-0 to FAST-3"),
        ("FASTER", 1.3, "nodes that there are"),
        ("FAST", 0.0, "from 0.001 to 1000000"),
        ("FAST", 1e20, "from 0.001 to 1000000"),
        ("FAST-1/2", 2.0, "nodes that there are"),
    ] {
        let error = step(&[(name, factor)]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn who_is_left_takes_what_a_lost_node_leaves() {
    let instance = instance(rules(Transfer::Overlapped, 0.0), 24);
    let layout = layout(vec![template(3, 8, ONE, &[(0, 4, 0)])]);
    let lose = |nodes: &[&str]| {
        let lose = nodes.iter().map(|name| (*name).to_owned()).collect();
        simulate_layout(&instance, &layout, &WhatIf { slow: vec![], lose })
    };
    let usual = lose(&[]).unwrap();
    let less = lose(&["FAST-1"]).unwrap();
    assert_eq!((less.num_pipelines, less.num_samples), (2, 24));
    assert!((less.pipeline_ns as f64 / usual.pipeline_ns as f64 - 1.5).abs() < 1e-6);
    assert_eq!(lose(&["SLOW-0"]).unwrap(), usual);
    assert!(lose(&["FAST-0", "FAST-1", "FAST-2"]).unwrap_err().to_string().contains("--lose"));
    assert!(lose(&["SLOW"]).unwrap_err().to_string().contains("SLOW-0 to SLOW-3"));
}

#[test]
fn a_loss_that_memory_does_not_allow_has_no_result() {
    let mut instance = instance(rules(Transfer::Overlapped, 0.0), 24);
    instance.classes.iter_mut().flat_map(|class| &mut class.memory).for_each(|of| of.optimizer_bytes = 1e9);
    let of = |count, num| Layout {
        templates: vec![template(count, num, ONE, &[(0, 4, 0)])],
        shard_optimizer: true,
    };
    // What three pipelines share of optimizer state, two must hold.
    let [before, after] =
        [of(3, 8), of(2, 12)].map(|layout| price(&instance, &layout).templates[0].stages[0].memory_bytes);
    assert!(after > before);
    let what_if = WhatIf { slow: vec![], lose: vec!["FAST-1".into()] };
    instance.pools[0].memory_bytes = after;
    assert_eq!(simulate_layout(&instance, &of(3, 8), &what_if).unwrap().num_pipelines, 2);
    instance.pools[0].memory_bytes = before;
    assert!(simulate_layout(&instance, &of(3, 8), &plain()).is_ok());
    let error = simulate_layout(&instance, &of(3, 8), &what_if).unwrap_err();
    let Error::LossDoesNotFit { device, needed_bytes, missing_bytes, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((device.as_str(), needed_bytes), ("FAST-0/0", after.ceil() as u64));
    assert_eq!(missing_bytes, (after - before).ceil() as u64);
}

#[test]
fn a_lost_node_stops_the_same_pipelines_here_and_in_a_new_plan() {
    // Larger groups get their devices first, whatever the order of templates.
    let instance = instance(rules(Transfer::Overlapped, 0.0), 48);
    let small = Template {
        stages: vec![Stage { tensor_parallel: 1, ..template(1, 1, ONE, &[(0, 4, 0)]).stages[0].clone() }],
        ..template(4, 8, ONE, &[(0, 4, 0)])
    };
    let layout = layout(vec![small, template(2, 8, ONE, &[(0, 2, 0), (2, 4, 1)])]);
    let mut left = Vec::new();
    for (pool, node) in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)] {
        let name = format!("{}-{node}", instance.pools[pool].kind);
        let what_if = WhatIf { slow: vec![], lose: vec![name] };
        let simulated = simulate_layout(&instance, &layout, &what_if).unwrap();
        let effort = Effort { nodes: 1_000_000, stop: None };
        let replanned = replan(&instance, &layout, None, &[(pool, node)], 1, &effort).unwrap();
        let keep = replanned.ways.iter().find(|way| way.name == "keep").unwrap();
        assert_eq!(simulated.num_pipelines as u64, keep.kept_pipelines, "{pool} {node}");
        left.push(keep.kept_pipelines);
    }
    assert_eq!(left, [5, 5, 4, 4, 5, 5, 6]);
    // And once more in what is left, where pipelines have kept their devices.
    let effort = Effort { nodes: 1_000_000, stop: None };
    let once = replan(&instance, &layout, None, &[(0, 0)], 1, &effort).unwrap();
    let keep = once.ways.iter().find(|way| way.name == "keep").unwrap();
    for node in 0..3 {
        let twice =
            replan(&once.instance, &keep.layout, Some(&keep.groups), &[(0, node)], 1, &effort).unwrap();
        let what_if = WhatIf { slow: vec![], lose: vec![format!("FAST-{node}")] };
        let simulated = simulate_placed(&once.instance, &keep.layout, Some(&keep.groups), &what_if).unwrap();
        let keep = twice.ways.iter().find(|way| way.name == "keep").unwrap();
        assert_eq!(simulated.num_pipelines as u64, keep.kept_pipelines, "{node}");
    }
}

#[test]
fn a_layout_with_a_fault_is_not_simulated() {
    let instance = instance(rules(Transfer::Overlapped, 0.0), 24);
    let fault = |layout: &Layout| simulate_layout(&instance, layout, &plain()).unwrap_err().to_string();
    assert!(fault(&layout(vec![template(1, 8, ONE, &[(0, 4, 0)])])).contains("global batch"));
    let huge = Instance { global_batch: 3_000_000, ..instance.clone() };
    let layout = layout(vec![template(1, 3_000_000, ONE, &[(0, 4, 0)])]);
    let error = simulate_layout(&huge, &layout, &plain()).unwrap_err().to_string();
    assert!(error.contains("simulated"), "{error}");
}

fn schedules() -> impl Strategy<Value = Schedule> {
    prop::sample::select(vec![ONE, Schedule::Interleaved(2), Schedule::Interleaved(3), Schedule::ZeroBubble])
}

proptest! {
    /// Between the busiest unit's work and everything in series, whatever the layout.
    #[test]
    fn a_step_lies_between_roofline_and_series(
        templates in prop::collection::vec(
            (1u32..3, 1u32..9, schedules(), prop::collection::btree_set(1u32..4, 0..3), any::<u8>(), any::<u8>()),
            1..3
        ),
        transfer in prop::sample::select(vec![Transfer::Published, Transfer::Serial, Transfer::Overlapped]),
        overlap in prop::sample::select(vec![0.0, 0.5, 1.0]),
        slow in 1.0f64..3.0,
    ) {
        let templates: Vec<Template> = templates
            .into_iter()
            .map(|(count, num, schedule, cuts, pools, bits)| {
                let mut ends: Vec<u32> = cuts.into_iter().collect();
                ends.push(4);
                let mut first = 0;
                let stages = ends.iter().enumerate().map(|(at, end)| {
                    Stage {
                        first_layer: std::mem::replace(&mut first, *end),
                        end_layer: *end,
                        pool: usize::from(pools >> at & 1),
                        tensor_parallel: 1 + u32::from(bits >> at & 1),
                        expert_parallel: 1,
                        replicas: 1,
                        recompute: bits >> (4 + at) & 1 == 1,
                    }
                });
                Template { count, micro_batch: 1, num_micro_batches: num, schedule, stages: stages.collect() }
            })
            .collect();
        let layout = layout(templates);
        let instance = instance(rules(transfer, overlap), layout.num_samples() as u32);
        let what_if = WhatIf { slow: vec![("FAST-0".into(), slow)], lose: vec![] };
        // Layouts that need more devices than there are, or have a schedule that they cannot, are refused.
        if let Ok(simulated) = simulate_layout(&instance, &layout, &what_if) {
            prop_assert!(simulated.roofline_ns <= simulated.step_ns, "{simulated:?}");
            prop_assert!(simulated.step_ns <= simulated.serial_ns, "{} {}", simulated.step_ns, simulated.serial_ns);
            prop_assert_eq!(simulated.num_samples, layout.num_samples());
        } else {
            prop_assume!(!crate::instance::check(&instance, &layout).is_empty());
        }
    }
}

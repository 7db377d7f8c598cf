//! The pricer against sums made by hand.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

const GIB: f64 = 1_073_741_824.0;

fn link(bytes_per_s: f64) -> Link {
    Link::uniform(Curve::AlphaBeta { latency_s: 0.0, bytes_per_s })
}

/// Two pools of two nodes of two devices; the second is half as fast. Four blocks of one second
/// forward and two backward on the fast one.
fn small() -> Instance {
    let class = LayerClass {
        name: "block".into(),
        gradient_bytes: 100.0,
        parameter_bytes: 100.0,
        output_bytes: 10.0,
        experts: None,
        memory: vec![
            LayerMemory {
                state_bytes: 800.0,
                optimizer_bytes: 800.0,
                activation_bytes: 50.0,
                recompute_bytes: 10.0,
            },
            LayerMemory {
                state_bytes: 400.0,
                optimizer_bytes: 400.0,
                activation_bytes: 30.0,
                recompute_bytes: 10.0,
            },
        ],
    };
    let pool = |kind: &str, slow: f64| Pool {
        kind: kind.into(),
        nodes: 2,
        devices_per_node: 2,
        memory_bytes: GIB,
        overhead_bytes: vec![5.0, 7.0],
        intra: link(1000.0),
        costs: (1..=2)
            .flat_map(|tp| (1..=2).map(move |b| (tp, b)))
            .map(|(tensor_parallel, micro_batch)| {
                let by = slow * f64::from(micro_batch) / f64::from(tensor_parallel);
                CostRow {
                    tensor_parallel,
                    expert_parallel: 1,
                    micro_batch,
                    forward_s: vec![by],
                    backward_s: vec![2.0 * by],
                    update_s: vec![0.25 * slow],
                }
            })
            .collect(),
    };
    Instance {
        degrees: vec![1, 2],
        classes: vec![class],
        runs: vec![Run { class: 0, count: 4 }],
        pools: vec![pool("fast", 1.0), pool("slow", 2.0)],
        inter: vec![vec![link(100.0), link(50.0)], vec![link(50.0), link(100.0)]],
        global_batch: 12,
        seq_len: 8,
        rules: Rules::published(),
    }
}

fn stage(layers: std::ops::Range<u32>, pool: usize, tensor_parallel: u32) -> Stage {
    Stage {
        first_layer: layers.start,
        end_layer: layers.end,
        pool,
        tensor_parallel,
        expert_parallel: 1,
        replicas: 1,
        recompute: false,
    }
}

fn template(count: u32, num_micro_batches: u32, stages: Vec<Stage>) -> Template {
    Template { count, micro_batch: 1, num_micro_batches, schedule: Schedule::default(), stages }
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-9, "{a} is not {b}");
}

#[test]
fn a_pipeline_over_two_kinds_by_hand() {
    let mut instance = small();
    instance.global_batch = 5;
    let layout = Layout {
        templates: vec![template(1, 5, vec![stage(0..2, 0, 1), stage(2..4, 1, 2)])],
        shard_optimizer: false,
    };
    assert_eq!(check(&instance, &layout), vec![]);
    let priced = price(&instance, &layout);
    // Stage 0: 2 · 3 s and 10 / 50 s; stage 1: 2 · 3 s and twice 0.2 s.
    close(priced.pipeline_s, 6.0 + 0.2 + 6.0 + 0.4 + 4.0 * 6.4);
    close(priced.update_s, 0.5);
    close(priced.exchange_s, 0.0);
    let stages = &priced.templates[0].stages;
    close(stages[0].memory_bytes, 2.0 * 1600.0 + 2.0 * 2.0 * 50.0 + 5.0);
    close(stages[1].memory_bytes, 2.0 * 800.0 + 2.0 * 30.0 + 7.0);
}

#[test]
fn the_flat_ring_pays_for_the_slowest_link_and_the_smallest_degree() {
    let instance = small();
    let layout = Layout {
        templates: vec![template(2, 4, vec![stage(0..4, 0, 2)]), template(2, 2, vec![stage(0..4, 1, 1)])],
        shard_optimizer: false,
    };
    assert_eq!(check(&instance, &layout), vec![]);
    let priced = price(&instance, &layout);
    close(priced.pipeline_s, 2.0 * 4.0 * 6.0);
    // 400 bytes at degree 1, four holders, 50 bytes a second between the kinds.
    close(priced.exchange_s, 2.0 * 3.0 * 100.0 / 50.0);
}

#[test]
fn the_hierarchy_sends_each_nodes_part_between_pools() {
    let mut instance = small();
    instance.rules.exchange = Exchange::Hierarchical;
    let layout = Layout {
        templates: vec![template(4, 2, vec![stage(0..4, 0, 1)]), template(2, 2, vec![stage(0..4, 1, 2)])],
        shard_optimizer: false,
    };
    assert_eq!(check(&instance, &layout), vec![]);
    let priced = price(&instance, &layout);
    // 800 bytes both ways: a half inside at 1000, a half between at 100, a half of a half across at 50.
    close(priced.exchange_s, 0.4 + 4.0 + 4.0);
}

#[test]
fn an_exchange_hides_behind_the_pass_that_completes_its_gradients() {
    let mut instance = small();
    instance.rules = Rules::hierarchical();
    let mut exposed = |overlap: f64, schedule: Schedule| {
        instance.rules.exchange_overlap = overlap;
        let template = Template { schedule, ..template(4, 3, vec![stage(0..4, 0, 1)]) };
        price(&instance, &Layout { templates: vec![template], shard_optimizer: false }).exchange_s
    };
    // 1.1 s a layer: each beside 2 s of backward of the layer before it, the first beside nothing.
    close(exposed(1.0, Schedule::OneForwardOneBackward), 1.1);
    close(exposed(1.0, Schedule::Interleaved(2)), 1.1);
    // Beside 1 s of weights' half: all four begin with the last layer's, 3 s before the end.
    close(exposed(1.0, Schedule::ZeroBubble), 4.4 - 3.0);
    close(exposed(0.5, Schedule::OneForwardOneBackward), 4.4 - 3.0);
    close(exposed(0.0, Schedule::OneForwardOneBackward), 4.4);
}

#[test]
fn recompute_and_sharding_trade_time_for_memory() {
    let mut instance = small();
    instance.rules = Rules::hierarchical();
    instance.global_batch = 4;
    let mut stages = vec![stage(0..2, 0, 1), stage(2..4, 0, 1)];
    stages[0].recompute = true;
    let layout = Layout { templates: vec![template(2, 2, stages)], shard_optimizer: true };
    assert_eq!(check(&instance, &layout), vec![]);
    let priced = price(&instance, &layout);
    let stage = &priced.templates[0].stages[0];
    close(stage.forward_s + stage.backward_s, 8.0);
    close(stage.memory_bytes, 2.0 * 1200.0 + 2.0 * 2.0 * 10.0 + 50.0 + 5.0);
    close(stage.update_s, 2.0 * 0.25 / 2.0);
}

#[test]
fn every_fault_is_named() {
    let instance = small();
    let sound = template(1, 12, vec![stage(0..4, 0, 1)]);
    let faults =
        |layout: &Layout| check(&instance, layout).iter().map(ToString::to_string).collect::<Vec<_>>();
    let of = |template: Template| faults(&Layout { templates: vec![template], shard_optimizer: false });
    assert_eq!(of(sound.clone()), Vec::<String>::new());
    let expect = |faults: Vec<String>, part: &str| {
        assert!(faults.iter().any(|fault| fault.contains(part)), "{faults:?} lack {part}");
    };
    expect(of(template(1, 11, sound.stages.clone())), "11 samples a step where the global batch is 12");
    expect(of(template(1, 12, vec![stage(0..3, 0, 1)])), "ends at layer 3 of 4");
    expect(of(template(1, 12, vec![stage(1..4, 0, 1)])), "where 0 comes next");
    expect(of(template(1, 12, vec![stage(0..4, 2, 1)])), "there is no pool 2");
    expect(of(template(6, 2, sound.stages.clone())), "do not fit into 2 nodes of 2");
    expect(of(Template { micro_batch: 4, num_micro_batches: 3, ..sound.clone() }), "is not known");
    let mut tight = instance.clone();
    tight.pools[0].memory_bytes = 1000.0;
    let layout = Layout { templates: vec![sound], shard_optimizer: false };
    assert_eq!(check(&tight, &layout)[0].message, "needs 6605 bytes of a fast's 1000");
}

/// The small instance with six tenths of every layer in experts, which pairs of devices may divide.
fn routed() -> Instance {
    let mut of = small();
    of.rules = Rules { exchange_overlap: 0.0, recompute: false, ..Rules::hierarchical() };
    of.classes[0].experts = Some(ExpertClass {
        gradient_bytes: 60.0,
        parameter_bytes: 60.0,
        state_bytes: 480.0,
        optimizer_bytes: 480.0,
    });
    for (pool, slow) in of.pools.iter_mut().zip([1.0, 2.0]) {
        pool.costs.push(CostRow {
            tensor_parallel: 1,
            expert_parallel: 2,
            micro_batch: 1,
            forward_s: vec![0.8 * slow],
            backward_s: vec![1.6 * slow],
            update_s: vec![0.25 * slow],
        });
    }
    of
}

#[test]
fn divided_experts_by_hand() {
    let instance = routed();
    let divided = Stage { expert_parallel: 2, ..stage(0..4, 0, 1) };
    let layout = Layout {
        templates: vec![Template { micro_batch: 2, ..template(2, 3, vec![divided.clone()]) }],
        shard_optimizer: true,
    };
    assert_eq!(check_instance(&instance), vec![]);
    assert_eq!(check(&instance, &layout), vec![]);
    let priced = price(&instance, &layout);
    let of = priced.templates[0].stages[0];
    close(priced.pipeline_s, 3.0 * 4.0 * 2.4);
    // Half of 480 less; 320 among four copies of what is dense, 240 among two copies of the experts.
    close(of.memory_bytes, 4.0 * (560.0 + 320.0 / 4.0 + 240.0 / 2.0) + 4.0 * 50.0 + 7.0);
    close(priced.update_s, 4.0 * 0.25 * (80.0 + 120.0) / 800.0);
    // Dense: 320 bytes, half inside of a node, half between two; experts: 480 between the nodes alone.
    close(priced.exchange_s, 0.16 + 1.6 + 2.4);
    assert_eq!(layout.devices_used(2), [4, 0]);
    let groups = assign(&instance, &layout).unwrap();
    assert!(groups.len() == 2 && groups.iter().all(|group| group.devices == 2));
    // The same devices as replicas that hold everything need more memory.
    let mut whole = layout.clone();
    whole.templates = vec![template(4, 3, vec![stage(0..4, 0, 1)])];
    let copies = price(&instance, &whole).templates[0].stages[0];
    assert!(copies.memory_bytes > of.memory_bytes + 4.0 * 200.0, "{copies:?}");
}

#[test]
fn experts_are_divided_in_whole_groups_of_one_node() {
    let instance = routed();
    let fault = |of: Stage, micro_batch: u32, num: u32| {
        let templates = vec![Template { micro_batch, ..template(1, num, vec![of]) }];
        let faults = check(&instance, &Layout { templates, shard_optimizer: true });
        faults.first().map_or_else(String::new, ToString::to_string)
    };
    let divided = Stage { expert_parallel: 2, ..stage(0..4, 0, 1) };
    assert_eq!(fault(divided.clone(), 2, 6), "");
    assert!(fault(divided.clone(), 1, 12).contains("1 samples for 2 groups"));
    assert!(fault(Stage { expert_parallel: 4, ..divided.clone() }, 4, 3).contains("experts on 4 devices"));
    assert!(fault(Stage { expert_parallel: 0, ..divided.clone() }, 2, 6).contains("experts on 0 devices"));
    assert!(fault(Stage { tensor_parallel: 2, ..divided.clone() }, 2, 6).contains("experts on 2 devices"));
    let mut flat = instance.clone();
    flat.rules.exchange = Exchange::FlatRing { bucket_bytes: 1e3 };
    let templates = vec![Template { micro_batch: 2, ..template(1, 6, vec![divided]) }];
    let faults = check(&flat, &Layout { templates, shard_optimizer: true });
    assert!(faults[0].message.contains("the hierarchical one only"), "{faults:?}");
    let mut bad = instance.clone();
    bad.classes[0].experts.as_mut().unwrap().state_bytes = 801.0;
    bad.pools[0].costs[0].expert_parallel = 3;
    assert_eq!(check_instance(&bad).len(), 2, "{:?}", check_instance(&bad));
}

#[test]
fn groups_are_packed_into_nodes() {
    assert!(check::fits(&[1, 2, 4], &[4, 2, 1], 3, 4));
    assert!(!check::fits(&[1, 2, 4], &[5, 2, 1], 3, 4));
    assert!(check::fits(&[1, 3], &[2, 2], 2, 4));
    assert!(!check::fits(&[1, 3], &[0, 3], 2, 4));
    assert!(!check::fits(&[1, 2], &[0, 3], 2, 3));
}

#[test]
fn an_instance_with_holes_is_refused() {
    assert_eq!(check_instance(&small()), vec![]);
    let mut bad = small();
    bad.inter[1].pop();
    bad.pools[0].devices_per_node = 1;
    bad.runs[0].class = 7;
    assert_eq!(check_instance(&bad).len(), 1 + 2 + 1);
    let mut gone = small();
    gone.pools[0].nodes = 0;
    assert_eq!(check_instance(&gone), vec![]);
    gone.pools[1].nodes = 0;
    assert!(check_instance(&gone)[0].message.contains("one device"));
}

#[test]
fn names_mean_kinds_nodes_and_devices() {
    let mut instance = small();
    // A kind whose name ends like a node of another.
    instance.pools[1].kind = "fast-1".into();
    let read = |name: &str| Named::read(&instance, "--slow", name).map_err(|error| error.to_string());
    let named = |pool, node, device| Ok(Named { pool, node, device });
    assert_eq!(read("fast"), named(0, None, None));
    assert_eq!(read("fast-0/1"), named(0, Some(0), Some(1)));
    assert_eq!(read("fast-1"), named(1, None, None));
    assert_eq!(read("fast-1-1"), named(1, Some(1), None));
    for name in ["fast-2", "fast-0/2", "fast-", "slow", "fast-0/", ""] {
        let error = read(name).unwrap_err();
        assert!(error.contains("fast-0 to fast-1, fast-1-0 to fast-1-1"), "{name}: {error}");
    }
    let lost = |name: &str| lost_nodes(&instance, &[name.to_owned()]);
    assert_eq!(lost("fast-0").unwrap(), [(0, 0)].into());
    assert!(lost("fast-0/1").unwrap_err().to_string().contains("fast-0 to fast-1"));
}

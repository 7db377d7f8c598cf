//! The document, its text and what it says where nothing fits.

use hgct_core::accelerator::Confidence;

use super::*;
use crate::instance::{
    CostRow, Curve, LayerClass, LayerMemory, Link, Pool, Rules, Run, Schedule, Stage, Template, assign,
};

const GIB: f64 = 1_073_741_824.0;

/// Two pools of two nodes of two devices, the second half as fast; embedding, four blocks, head.
fn instance() -> Instance {
    let class = |name: &str, size: f64| LayerClass {
        name: name.into(),
        gradient_bytes: size * GIB,
        parameter_bytes: size * GIB,
        output_bytes: 1e6,
        experts: None,
        memory: [1.0, 2.0]
            .map(|degree| LayerMemory {
                state_bytes: 2.0 * size * GIB / degree,
                optimizer_bytes: 4.0 * size * GIB / degree,
                activation_bytes: 0.5 * GIB / degree,
                recompute_bytes: 0.1 * GIB,
            })
            .to_vec(),
    };
    let costs = |slow: f64| {
        let pairs = [(1, 1), (1, 2), (2, 1), (2, 2)];
        let row = |(tensor_parallel, micro_batch): (u32, u32)| {
            let by = slow * f64::from(micro_batch) / f64::from(tensor_parallel);
            CostRow {
                tensor_parallel,
                expert_parallel: 1,
                micro_batch,
                forward_s: vec![0.1 * by, by, 0.5 * by],
                backward_s: vec![0.1 * by, 2.0 * by, by],
                update_s: vec![0.01; 3],
            }
        };
        pairs.map(row).to_vec()
    };
    let link = |bytes_per_s: f64| Link::uniform(Curve::AlphaBeta { latency_s: 1e-5, bytes_per_s });
    let pool = |kind: &str, slow: f64| Pool {
        kind: kind.into(),
        nodes: 2,
        devices_per_node: 2,
        memory_bytes: 40.0 * GIB,
        overhead_bytes: vec![2.0 * GIB, 3.0 * GIB],
        intra: link(1e11),
        costs: costs(slow),
    };
    Instance {
        degrees: vec![1, 2],
        classes: vec![class("embedding", 0.5), class("block", 1.0), class("head", 0.5)],
        runs: vec![Run { class: 0, count: 1 }, Run { class: 1, count: 4 }, Run { class: 2, count: 1 }],
        pools: vec![pool("fast", 1.0), pool("slow", 2.0)],
        inter: vec![vec![link(2e10), link(1e10)], vec![link(1e10), link(2e10)]],
        global_batch: 24,
        seq_len: 1024,
        rules: Rules::hierarchical(),
    }
}

fn stage(first_layer: u32, end_layer: u32, pool: usize, recompute: bool) -> Stage {
    Stage { first_layer, end_layer, pool, tensor_parallel: 2, expert_parallel: 1, replicas: 1, recompute }
}

fn answer() -> Answer {
    let template = |count, num_micro_batches, stages| Template {
        count,
        micro_batch: 2,
        num_micro_batches,
        schedule: Schedule::default(),
        stages,
    };
    let layout = Layout {
        templates: vec![
            template(1, 8, vec![stage(0, 3, 0, true), stage(3, 6, 0, false)]),
            template(1, 4, vec![stage(0, 6, 1, false)]),
        ],
        shard_optimizer: true,
    };
    let instance = instance();
    let iteration_s = price(&instance, &layout).iteration_s;
    Answer {
        format: Answer::FORMAT,
        parent: None,
        basis: Basis::Estimate,
        model: ModelFacts {
            family: "llama".into(),
            parameters: 2_684_354_560,
            active_parameters: 2_684_354_560,
            train_flops: 1e14,
            tied_embeddings: None,
        },
        peaks: vec![2e14, 1e14],
        confidence: vec![Confidence::Vendor, Confidence::Estimate],
        instance,
        ends: None,
        layout,
        groups: None,
        prediction: Expected {
            iteration_s,
            slow_s: Some(1.5 * iteration_s),
            fast_s: Some(0.8 * iteration_s),
            bound_s: Some(0.9 * iteration_s),
            prices: vec![0.15, 0.1],
            limited_by: "compute".into(),
            finished: true,
        },
        plan: None,
    }
}

/// A stand-in for the search: speed by what devices, memory and links there are.
fn pretend(instance: &Instance) -> Option<f64> {
    let devices: u64 = instance.pools.iter().map(Pool::num_devices).sum();
    let memory = instance.pools[0].memory_bytes / GIB;
    (devices > 2).then_some(devices as f64 * 0.001 + memory * 0.00003)
}

#[test]
fn an_answer_reads_back_and_is_checked() {
    let answer = answer();
    let text = hgct_core::canonical::encode(&answer);
    assert_eq!(Answer::from_json("plan.json", &text).unwrap(), answer);
    let mut broken = answer.clone();
    broken.layout.templates[1].stages[0].end_layer = 5;
    let error =
        Answer::from_json("plan.json", &hgct_core::canonical::encode(&broken)).unwrap_err().to_string();
    assert!(
        error.starts_with("plan.json: `layout` is template 1") && error.contains("layer 5 of 6"),
        "{error}"
    );
    let mut placed = answer.clone();
    let mut groups = assign(&answer.instance, &answer.layout).unwrap();
    let last = groups.len() - 1;
    groups[last].node = 1;
    placed.groups = Some(groups.clone());
    let read = |answer: &Answer| Answer::from_json("plan.json", &hgct_core::canonical::encode(answer));
    assert_eq!(read(&placed).unwrap(), placed);
    groups[last].node = 2;
    placed.groups = Some(groups.clone());
    assert!(read(&placed).unwrap_err().to_string().contains("slow has no node 2"));
    groups[1] = Group { stage: 1, ..groups[0] };
    placed.groups = Some(groups.clone());
    assert!(read(&placed).unwrap_err().to_string().contains("is there twice"));
    groups.pop();
    placed.groups = Some(groups);
    assert!(read(&placed).unwrap_err().to_string().contains("are not those of the layout"));
    let mut old = answer;
    old.format = 9;
    assert!(
        Answer::from_json("p", &hgct_core::canonical::encode(&old))
            .unwrap_err()
            .to_string()
            .contains("`format` is 9")
    );
}

#[test]
fn the_text_is_as_it_was() {
    let answer = answer();
    let why =
        why(&answer, &[Some(0.0052), Some(0.0026)], Some(&mut |changed: &Instance| Ok(pretend(changed))));
    golden("answer.txt", &answer.tell(&why).to_string());
}

#[test]
fn a_comparison_is_as_it_was() {
    let first = answer();
    let mut second = first.clone();
    second.layout.templates[0].num_micro_batches = 9;
    second.layout.templates[1].num_micro_batches = 3;
    second.prediction.iteration_s = second.price().iteration_s;
    second.prediction.bound_s = None;
    let compared = compare(&first, &second);
    assert!(compared.same_problem && compared.speedup > 1.0);
    golden("compare.txt", &compared.to_string());
}

/// Compares with a golden file, or accepts a wanted change.
fn golden(name: &str, found: &str) {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/answer/golden").join(name);
    if std::env::var_os("HGCT_UPDATE_GOLDEN").is_some() {
        std::fs::write(&file, found).unwrap();
    }
    let wanted = std::fs::read_to_string(&file).unwrap();
    assert_eq!(wanted, found, "{name}: HGCT_UPDATE_GOLDEN=1 accepts a wanted change");
}

#[test]
fn rows_add_up_to_the_devices_used() {
    let answer = answer();
    let rows = answer.rows();
    assert_eq!(rows.iter().map(|row| row.devices).sum::<u64>(), 6);
    assert!(
        rows.iter().all(|row| row.busy > 0.0 && row.busy <= 1.0 && row.memory_bytes < row.memory_limit_bytes)
    );
    let expected = 1e14 * 24.0 / answer.prediction.iteration_s / (4.0 * 2e14 + 2.0 * 1e14);
    assert!((answer.mfu().unwrap() - expected).abs() < 1e-12);
    assert!((answer.prediction.gap().unwrap() - 0.1).abs() < 1e-12);
}

#[test]
fn idle_and_slowing_kinds_are_named() {
    let answer = answer();
    assert_eq!(why(&answer, &[], None).idle, [Idle { kind: "slow".into(), devices: 2 }]);
    assert!(why(&answer, &[], None).rejected.is_empty());
    assert_eq!(why(&answer, &[], None).shadow_prices[1].name, "one more device of slow (of the bound)");
    assert_eq!(limited_by(&answer.price()), "compute");
    let mut three = answer;
    three.instance.pools.push(three.instance.pools[1].clone());
    three.instance.pools[2].kind = "slowest".into();
    let row = three.instance.inter[1].clone();
    three.instance.inter.push(row);
    for row in &mut three.instance.inter {
        row.push(row[1].clone());
    }
    // A search that finds more the fewer kinds there are.
    let mut search = |instance: &Instance| Ok(Some(1.0 / instance.pools.len() as f64));
    let mut ended = |_: &Instance| Err(TimeOver);
    let without = why(&three, &[], Some(&mut ended));
    assert_eq!((without.left_out.len(), without.shadow_prices.len(), without.rejected.len()), (8, 0, 0));
    assert!(three.tell(&without).to_string().contains("  - without slowest\n"));
    let why = why(&three, &[Some(1.0), None, Some(0.5)], Some(&mut search));
    assert!(
        why.reasons.iter().any(|reason| reason.starts_with("slowest slows the run down")),
        "{:?}",
        why.reasons
    );
    assert_eq!(why.rejected.len(), 6);
    assert!(why.shadow_prices.iter().all(|row| row.gain >= 0.0));
    assert_eq!(why.shadow_prices.len(), 5);
}

#[test]
fn below_the_sum_of_its_kinds_an_answer_names_the_limit() {
    let mut answer = answer();
    let own = answer.iterations_per_s();
    let below = |answer: &Answer, sum: f64| why(answer, &[Some(0.7 * sum), Some(0.3 * sum)], None).below_sum;
    assert_eq!(below(&answer, own / 0.96), None);
    // Slow links between the kinds: the exchange is what stands between.
    answer.instance.inter[0][1] = Link::uniform(Curve::AlphaBeta { latency_s: 0.0, bytes_per_s: 1e8 });
    answer.prediction.iteration_s = answer.price().iteration_s;
    let sum = 1.3 / answer.prediction.iteration_s;
    let slow = below(&answer, sum).unwrap();
    assert_eq!(slow.limit, "exchange");
    assert!(slow.reason.contains("from fast to slow, carries 0.1 GB/s"), "{}", slow.reason);
    let parts: f64 = slow.parts.iter().map(|part| part.seconds).sum();
    assert!((slow.sum_s + parts - answer.prediction.iteration_s).abs() < 1e-9);
    assert!(!slow.proven);
    answer.prediction.bound_s = Some(0.99 * answer.prediction.iteration_s);
    let proven = below(&answer, sum).unwrap();
    assert!(proven.proven && proven.reason.contains("the bound proves"), "{}", proven.reason);
    let text = answer.tell(&why(&answer, &[Some(sum), Some(0.01)], None)).to_string();
    assert!(text.contains("they do not reach 95 % of it"), "{text}");
}

#[test]
fn a_model_that_fits_nowhere_is_told_by_how_much() {
    assert_eq!(shortage(&instance()), None);
    let mut small = instance();
    for pool in &mut small.pools {
        pool.memory_bytes = 6.0 * GIB;
    }
    // 30 GiB of state and 0.1 of each of six layers; 4 GiB free on each of eight devices.
    let text = shortage(&small).map(|shortage| shortage.to_string());
    assert_eq!(text, None);
    small.pools.pop();
    small.inter = vec![vec![small.inter[0][0].clone()]];
    let text = shortage(&small).unwrap().to_string();
    assert_eq!(
        text,
        "at least 30.6 GiB are needed, and all devices together have 16.0 GiB beside what frameworks take: 14.6 GiB \
         are missing; needed are 4 more devices of fast at least, or 1.9 times the memory on each device at least"
    );
    small.pools[0].memory_bytes = 3.5 * GIB;
    let text = shortage(&small).unwrap().to_string();
    assert!(
        text.starts_with(
            "one block alone needs 2.1 GiB of a device, whatever the tensor parallelism, and 1.5 GiB"
        ),
        "{text}"
    );
}

#[test]
fn a_batch_that_no_sum_gives_is_told_the_nearest() {
    let mut of = instance();
    assert_eq!(check_batch(&of), Ok(()));
    for pool in &mut of.pools {
        pool.costs.retain(|cost| cost.micro_batch == 2);
    }
    of.global_batch = 25;
    let error = check_batch(&of).unwrap_err().to_string();
    assert_eq!(
        error,
        "the global batch is 25, which no sum of micro-batches of [2] samples gives; nearest that work: 24, 26"
    );
    for (batch, sizes, works) in
        [(7, [3, 5], false), (8, [3, 5], true), (26, [3, 5], true), (2, [3, 5], false)]
    {
        for pool in &mut of.pools {
            let row = pool.costs[0].clone();
            pool.costs = sizes.map(|micro_batch| CostRow { micro_batch, ..row.clone() }).to_vec();
        }
        of.global_batch = batch;
        assert_eq!(check_batch(&of).is_ok(), works, "{batch} of {sizes:?}");
    }
    of.global_batch = 0;
    assert!(check_batch(&of).unwrap_err().to_string().contains("nearest that work: 3"));
}

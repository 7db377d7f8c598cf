//! Plans synthetic clusters of 16 to 16,384 cards and prints what was found, how far from the best it
//! can be, and how long the search took.
//!
//! ```text
//! cargo run --release -p hgct-planner --example large_plan             # 1,024 cards, 1,024 samples
//! cargo run --release -p hgct-planner --example large_plan -- 256      # … 256 samples a step
//! cargo run --release -p hgct-planner --example large_plan -- ten      # 10,000 cards of six kinds
//! cargo run --release -p hgct-planner --example large_plan -- curve    # seconds by cards
//! cargo run --release -p hgct-planner --example large_plan -- curve benchmarks/planner-2026-11-29
//! ```
//!
//! The last one writes what it measured as `….csv`, and a picture of it as `….svg`.
//!
//! Cards are described by an effective rate, memory and a link inside a node; figures are round
//! numbers near those of the cards they are named after, not measurements.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "an example")]

use std::fmt::Write as _;
use std::time::Instant;

use hgct_planner::instance::{CostRow, Curve, Instance, LayerClass, LayerMemory, Link, Pool, Rules, Run};
use hgct_planner::wide::{Effort, Found, find};

const GIB: f64 = 1_073_741_824.0;

/// A card: name, reached Tflop/s in large products, memory GiB.
const KINDS: [(&str, f64, f64); 6] = [
    ("h800", 620.0, 80.0),
    ("a800", 230.0, 80.0),
    ("ascend-910b", 220.0, 64.0),
    ("c550", 190.0, 64.0),
    ("mi300x", 520.0, 192.0),
    ("h20", 130.0, 96.0),
];

/// A dense Llama shape with heads of 128, MLP of 8/3 hidden.
struct Model {
    hidden: f64,
    layers: u32,
    vocabulary: f64,
    tokens: f64,
}

/// The large one of about 100 billion parameters.
const LARGE: Model = Model { hidden: 9216.0, layers: 96, vocabulary: 128_000.0, tokens: 4096.0 };

fn synthetic(kinds: &[(&str, f64, f64)], nodes: u32, global_batch: u32, model: &Model) -> Instance {
    let degrees = vec![1, 2, 4, 8];
    let (h, t) = (model.hidden, model.tokens);
    // Parameters and forward Tflop a sample of embedding, block, head.
    let block = 12.0 * h * h;
    let parameters = [model.vocabulary * h, block, model.vocabulary * h];
    let flops = [0.0, 2.0 * t * block + 2.0 * t * t * h, 2.0 * t * model.vocabulary * h];
    // Kept in half precision: 34 bytes an element of a block (Korthikanti et al. 2022, without the
    // scores that fused attention does not keep); logits of the head.
    let kept = [2.0 * t * h, 34.0 * t * h, 6.0 * t * model.vocabulary];
    let classes = ["embedding", "block", "head"]
        .iter()
        .enumerate()
        .map(|(at, name)| LayerClass {
            name: (*name).into(),
            gradient_bytes: 2.0 * parameters[at],
            parameter_bytes: 2.0 * parameters[at],
            output_bytes: 2.0 * t * h,
            experts: None,
            memory: degrees
                .iter()
                .map(|degree| LayerMemory {
                    state_bytes: 4.0 * parameters[at] / f64::from(*degree),
                    optimizer_bytes: 12.0 * parameters[at] / f64::from(*degree),
                    activation_bytes: kept[at] / f64::from(*degree),
                    recompute_bytes: 2.0 * t * h / f64::from(*degree),
                })
                .collect(),
        })
        .collect();
    let (inside, between, across) = (200e9, 25e9, 12.5e9);
    let link = |bytes_per_s| Link::uniform(Curve::AlphaBeta { latency_s: 5e-6, bytes_per_s });
    let cost = |rate: f64, tensor_parallel: u32, micro_batch: u32| {
        let (d, b) = (f64::from(tensor_parallel), f64::from(micro_batch));
        // Narrow products reach less; two all-reduces a block and direction.
        let reached = rate * 1e12 * (h / d / (h / d + 96.0)) * (b * t / (b * t + 256.0));
        let ring = 2.0 * (d - 1.0) / d * 2.0 * b * t * h / inside;
        let forward = |at: usize| b * flops[at] / d / reached + if at == 1 { 2.0 * ring } else { 0.0 } + 2e-5;
        let backward =
            |at: usize| 2.0 * b * flops[at] / d / reached + if at == 1 { 2.0 * ring } else { 0.0 } + 4e-5;
        CostRow {
            tensor_parallel,
            expert_parallel: 1,
            micro_batch,
            forward_s: (0..3).map(forward).collect(),
            backward_s: (0..3).map(backward).collect(),
            update_s: parameters.iter().map(|p| p / d * 28.0 / 1.5e12).collect(),
        }
    };
    let pool = |(kind, rate, memory): &(&str, f64, f64)| Pool {
        kind: (*kind).into(),
        nodes,
        devices_per_node: 8,
        memory_bytes: memory * GIB,
        overhead_bytes: vec![3.0 * GIB; degrees.len()],
        intra: link(inside),
        costs: degrees.iter().flat_map(|d| [1, 2, 4].map(|b| cost(*rate, *d, b))).collect(),
    };
    let num = kinds.len();
    let inter =
        (0..num).map(|p| (0..num).map(|q| link(if p == q { between } else { across })).collect()).collect();
    Instance {
        classes,
        runs: [(0, 1), (1, model.layers), (2, 1)].map(|(class, count)| Run { class, count }).to_vec(),
        pools: kinds.iter().map(pool).collect(),
        degrees,
        inter,
        global_batch,
        seq_len: t as u32,
        rules: Rules::hierarchical(),
    }
}

fn show(name: &str, instance: &Instance) -> Found {
    let started = Instant::now();
    let found = find(instance, None, &Effort::default()).expect("a sound instance");
    let seconds = started.elapsed().as_secs_f64();
    let step = found.best.as_ref().map(|(_, priced)| priced.iteration_s);
    println!(
        "{name}: {} cards, {} samples: step {:.3} s, at best {:.3} s (compute {:.3} s), gap {:.2} %, limited by {}, \
         searched {seconds:.2} s, {} nodes{}",
        instance.num_devices(),
        instance.global_batch,
        step.unwrap_or(f64::NAN),
        found.proven_s,
        found.bound.compute_s,
        100.0 * found.gap.unwrap_or(1.0),
        found.limited_by,
        found.nodes,
        if found.finished { "" } else { ", not finished" },
    );
    found
}

fn layout(instance: &Instance, found: &Found) {
    let Some((layout, priced)) = &found.best else { return };
    println!(
        "  pipelines {:.3} s, update {:.3} s, exchange {:.3} s of {:.3} s shown",
        priced.pipeline_s, priced.update_s, priced.exchange_s, priced.exchange_whole_s
    );
    for (template, priced) in layout.templates.iter().zip(&priced.templates) {
        println!(
            "  {} × {} micro-batches of {}: {:.3} s, bubble {:.3} s, transfer {:.3} s",
            template.count,
            template.num_micro_batches,
            template.micro_batch,
            priced.total_s,
            priced.bubble_s,
            priced.transfer_s
        );
        for (stage, priced) in template.stages.iter().zip(&priced.stages) {
            println!(
                "    {:>3}..{:<3} {} × {}{}: {:.4} s, {:.1} GiB, busy {:.0} %",
                stage.first_layer,
                stage.end_layer,
                instance.pools[stage.pool].kind,
                stage.tensor_parallel,
                if stage.recompute { ", recompute" } else { "" },
                priced.forward_s + priced.backward_s,
                priced.memory_bytes / GIB,
                100.0 * priced.busy
            );
        }
    }
    for alternative in &found.alternatives {
        let kinds: Vec<&str> = alternative.pools.iter().map(|p| instance.pools[*p].kind.as_str()).collect();
        match &alternative.best {
            Some((_, priced)) => println!("  {} alone: {:.3} s", kinds.join(" + "), priced.iteration_s),
            None => println!("  {} alone: does not fit", kinds.join(" + ")),
        }
    }
}

/// What was measured of one size.
struct Row {
    cards: u64,
    samples: u32,
    layers: u32,
    seconds: f64,
    step_s: f64,
    bound_s: f64,
    gap: f64,
    peak_bytes: f64,
}

/// The search over `8 << power` cards; small clusters train small models.
fn of_size(power: u32) -> Row {
    let model = match 8u32 << power {
        ..=64 => Model { hidden: 4096.0, layers: 32, ..LARGE },
        65..=256 => Model { hidden: 8192.0, layers: 64, ..LARGE },
        _ => LARGE,
    };
    let kinds = if power == 1 { &KINDS[..2] } else { &KINDS[..4] };
    let instance = synthetic(kinds, (1 << power) / kinds.len() as u32, (8 << power).max(256), &model);
    let started = Instant::now();
    let found = show("curve", &instance);
    Row {
        cards: instance.num_devices(),
        samples: instance.global_batch,
        layers: instance.num_layers(),
        seconds: started.elapsed().as_secs_f64(),
        step_s: found.best.as_ref().map_or(f64::NAN, |(_, priced)| priced.iteration_s),
        bound_s: found.proven_s,
        gap: found.gap.unwrap_or(1.0),
        peak_bytes: peak_bytes(),
    }
}

/// The largest resident set of this process so far, where the system tells.
fn peak_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) * 1024.0
}

/// Processor and cores of this machine, where the system tells.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown processor");
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!("{model}, {cores} cores")
}

fn csv(rows: &[Row]) -> String {
    let mut text = format!(
        "# Search for a plan by cards, one thread, on: {}\n\
         cards,samples,layers,search_s,step_s,bound_s,gap,peak_bytes\n",
        machine()
    );
    for row in rows {
        let _ = writeln!(
            text,
            "{},{},{},{:.3},{:.4},{:.4},{:.4},{:.0}",
            row.cards, row.samples, row.layers, row.seconds, row.step_s, row.bound_s, row.gap, row.peak_bytes
        );
    }
    text
}

/// Seconds over cards, both axes by powers: a line a decade of seconds, a tick a doubling of cards.
fn svg(rows: &[Row]) -> String {
    let (width, height, margin) = (640.0, 400.0, 60.0);
    let logs = |of: fn(&Row) -> f64| rows.iter().map(move |row| of(row).log10());
    let (left, right) = (logs(|r| r.cards as f64), logs(|r| r.cards as f64));
    let (left, right) = (left.fold(f64::INFINITY, f64::min), right.fold(0.0, f64::max));
    let (low, high) = (logs(|r| r.seconds), logs(|r| r.seconds));
    let (low, high) =
        (low.fold(f64::INFINITY, f64::min).floor(), high.fold(f64::NEG_INFINITY, f64::max).ceil());
    let x = |cards: f64| margin + (cards.log10() - left) / (right - left) * (width - 2.0 * margin);
    let y = |seconds: f64| height - margin - (seconds.log10() - low) / (high - low) * (height - 2.0 * margin);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"{margin}\" y=\"24\" font-size=\"14\">Seconds of a search by cards</text>\n\
         <text x=\"{margin}\" y=\"42\" fill=\"#555\">{}</text>\n",
        machine()
    );
    for decade in low as i32..=high as i32 {
        let (seconds, at) = (10f64.powi(decade), y(10f64.powi(decade)));
        let _ = writeln!(
            text,
            "<line x1=\"{margin}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\n\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{seconds} s</text>",
            width - margin,
            margin - 6.0,
            at + 4.0
        );
    }
    for row in rows {
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(row.cards as f64),
            height - margin + 20.0,
            row.cards
        );
    }
    let points: Vec<String> =
        rows.iter().map(|row| format!("{:.1},{:.1}", x(row.cards as f64), y(row.seconds))).collect();
    let _ = writeln!(
        text,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#1f6feb\" stroke-width=\"2\"/>",
        points.join(" ")
    );
    for row in rows {
        let _ = writeln!(
            text,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"#1f6feb\"><title>{} cards: {:.2} s, gap {:.1} %</title></circle>",
            x(row.cards as f64),
            y(row.seconds),
            row.cards,
            row.seconds,
            100.0 * row.gap
        );
    }
    text + "</svg>\n"
}

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("ten") => {
            let instance = synthetic(&KINDS, 208, 8192, &LARGE);
            let found = show("six kinds", &instance);
            layout(&instance, &found);
        }
        Some("curve") => {
            let rows: Vec<Row> = (1..=11).map(of_size).collect();
            if let Some(name) = std::env::args().nth(2) {
                std::fs::write(format!("{name}.csv"), csv(&rows)).expect("a folder that can be written");
                std::fs::write(format!("{name}.svg"), svg(&rows)).expect("a folder that can be written");
            }
        }
        batch => {
            let batch = batch.map_or(1024, |b| b.parse().expect("a number of samples, `ten` or `curve`"));
            let instance = synthetic(&KINDS[..4], 32, batch, &LARGE);
            let found = show("four kinds", &instance);
            layout(&instance, &found);
        }
    }
}

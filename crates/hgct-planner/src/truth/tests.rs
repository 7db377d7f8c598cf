#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::tables::tests::tables;
use crate::tables::{MeasuredStage, parse_measured_transformers};

fn plan(stages: &[(u32, u32, &[&str])], global_batch: u32) -> MeasuredLayers {
    let replica = |kind: &&str| MeasuredReplica { kind: (*kind).into(), tensor_parallel: 2 };
    MeasuredLayers {
        id: "by hand".into(),
        model: "tiny".into(),
        micro_batch: 2,
        global_batch,
        stages: stages
            .iter()
            .map(|(first_layer, end_layer, kinds)| MeasuredStage {
                first_layer: *first_layer,
                end_layer: *end_layer,
                replicas: kinds.iter().map(replica).collect(),
            })
            .collect(),
        iteration_s: 1.0,
        peak_bytes: 1e9,
    }
}

#[test]
fn one_device_group_takes_its_layers_and_its_update() {
    let constants = Constants::default();
    let predicted = predict_layers(&tables(), &constants, &plan(&[(0, 4, &["FAST"])], 8)).unwrap();
    let step = 4.0 * (0.0011 + 0.03 + 0.03 + 0.012);
    assert!((predicted.pipeline_s - step).abs() < 1e-12, "{predicted:?}");
    assert!(predicted.exchange_s.abs() < 1e-12);
    // 1 ms of the largest layer's 1e7 parameters, for 2.8e7.
    assert!((predicted.update_s - 0.0028).abs() < 1e-12, "{predicted:?}");
    let bytes = 2.8e7 / 2.0 * 24.0 + 1.14 * 4.0 * 2.0 * 8.9e7 / 2.0 + 3.5e9;
    assert!((predicted.peak_bytes.unwrap() - bytes).abs() < 1.0, "{predicted:?}");
    let least = 2.8e7 / 2.0 * 16.0 + 4.0 * 2.0 * 8.9e7 / 2.0;
    assert!((predicted.least_peak_bytes.unwrap() - least).abs() < 1.0, "{predicted:?}");
}

#[test]
fn a_peak_below_its_own_tables_is_told_apart() {
    let mut measured = Measured {
        tables: tables(),
        layers: vec![plan(&[(0, 4, &["FAST"])], 8), plan(&[(0, 4, &["FAST"])], 8)],
        transformers: Vec::new(),
    };
    let rows = measured.rows(&Constants::default()).unwrap();
    let least = rows[0].predicted.least_peak_bytes.unwrap();
    measured.layers[0].peak_bytes = 0.99 * least;
    measured.layers[1].peak_bytes = rows[0].predicted.peak_bytes.unwrap() / 1.1;
    let rows = measured.rows(&Constants::default()).unwrap();
    assert!(rows[0].contradicts_its_tables() && !rows[1].contradicts_its_tables());
    let set = &summaries(&rows)[0];
    assert_eq!(set.contradictions, 1);
    assert!((set.credible_peak_mean_error.unwrap() - 0.1).abs() < 1e-9);
    assert!(set.peak_mean_error.unwrap() > 1.0);
}

#[test]
fn a_slower_replica_or_link_is_never_cheaper() {
    let (tables, constants) = (tables(), Constants::default());
    let price = |stages: &[(u32, u32, &[&str])]| {
        predict_layers(&tables, &constants, &plan(stages, 32)).unwrap().iteration_s
    };
    let fast = price(&[(0, 2, &["FAST", "FAST"]), (2, 4, &["FAST", "FAST"])]);
    let mixed = price(&[(0, 2, &["FAST", "SLOW"]), (2, 4, &["FAST", "FAST"])]);
    let slow = price(&[(0, 2, &["FAST", "SLOW"]), (2, 4, &["FAST", "SLOW"])]);
    assert!(fast < mixed && mixed < slow, "{fast} {mixed} {slow}");
}

#[test]
fn the_published_price_knows_no_overlap() {
    let row = plan(&[(0, 2, &["FAST"]), (2, 4, &["SLOW"])], 16);
    let (seconds, peak_bytes) = published_layers(&tables(), &row).unwrap();
    let (first, second) = (0.0311, 3.0 * 0.042);
    let bytes: f64 = 1e6 * 4.0 * 2.0;
    let hop = |rate: f64| bytes / (rate * (0.1 * (bytes / 1e6).log2() + 1.0) * 1e9);
    // The first stage pays its activation, the last twice its gradient; eight micro-batches.
    let (first, second) = (first + hop(10.0), second + 2.0 * hop(2.0));
    let expected = first + second + 7.0 * first.max(second) + 0.001;
    assert!((seconds - expected).abs() < 1e-12, "{seconds} {expected}");
    assert!(peak_bytes > 3.0e9);
}

fn transformer(micro_batch: u32, degree: u32, replicas: u32, stages: u32) -> MeasuredTransformer {
    let header = "global batch,micro batch,hidden size,attention heads,# layers,sequence length,tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)";
    let row = format!("512,{micro_batch},3072,32,32,2048,{degree},{replicas},{stages},1000");
    parse_measured_transformers("a.csv", &format!("{header}\n{row}\n")).unwrap().remove(0)
}

#[test]
fn no_transformer_is_faster_than_its_peak() {
    let (accelerator, constants) = (Accelerator::a100(), Constants::default());
    for (micro_batch, degree, replicas, stages) in
        [(8, 1, 64, 1), (2, 4, 16, 1), (1, 8, 4, 2), (2, 16, 4, 1), (4, 2, 8, 4), (1, 1, 1, 1)]
    {
        let row = transformer(micro_batch, degree, replicas, stages);
        let predicted = predict_transformer(&accelerator, &constants, &row);
        // 8 operations a parameter and token with recompute, blocks only.
        let parameters = 12.0 * 32.0 * 3072.0 * 3072.0;
        let peak = accelerator.peak_flops * f64::from(degree * replicas * stages);
        let least = 8.0 * parameters * 512.0 * 2048.0 / peak;
        let part = least / predicted.iteration_s;
        assert!((0.05..0.75).contains(&part), "{part} of the peak for {row:?}");
    }
}

#[test]
fn errors_are_summed_up_a_set() {
    let measured = Measured {
        tables: tables(),
        layers: vec![
            plan(&[(0, 4, &["FAST"])], 8),
            plan(&[(0, 2, &["FAST"]), (2, 4, &["SLOW"])], 8),
            plan(&[(0, 4, &["FAST"])], 16),
            plan(&[(0, 2, &["SLOW"]), (2, 4, &["FAST"])], 8),
        ],
        transformers: vec![transformer(8, 1, 64, 1), transformer(4, 1, 64, 1)],
    };
    let rows = measured.rows(&Constants::default()).unwrap();
    let summaries = summaries(&rows);
    let sets: Vec<(&str, usize)> = summaries.iter().map(|set| (set.set.as_str(), set.rows)).collect();
    assert_eq!(sets, [("FAST", 2), ("a100", 2), ("mixed", 2)]);
    let expected =
        rows.iter().filter(|row| row.set == "FAST").map(|row| row.error().abs()).sum::<f64>() / 2.0;
    assert!((summaries[0].mean_error - expected).abs() < 1e-12);

    let crossed = cross_validate(&measured, &Constants::default()).unwrap();
    assert_eq!(crossed.sets.len(), 3);
    assert_eq!(crossed, cross_validate(&measured, &Constants::default()).unwrap());
}

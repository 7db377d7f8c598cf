//! The reference model against finite differences and against what must not change.

use hgct_core::dtype::DType;
use hgct_core::init;
use hgct_core::model::{EMBEDDING, LayerKind, ModelSpec, RopeScaling, TensorSpec};
use hgct_core::plan::StageId;

use super::ReferenceEngine;
use super::layers::{Input, Layer, Tensors};
use crate::engine::{BackwardPart, Edge, Engine, GradientReady, ImportRows, Lease, StageLoad, Ticket};

const SEQ_LEN: usize = 5;
const SAMPLES: usize = 2;

fn model(tied: bool) -> ModelSpec {
    ModelSpec {
        vocab_size: 11,
        hidden_size: 8,
        intermediate_size: 12,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::Linear { factor: 2.0 },
        tie_embeddings: tied,
        max_position: 64,
        initializer_range: 0.4,
    }
}

/// Normal values of the model's deviation, different for each name.
fn values(name: &str, count: usize) -> Vec<f64> {
    let mut out = vec![0f32; count];
    let tensor = TensorSpec { name: name.into(), shape: vec![1, count as u64] };
    init::fill(&model(false), 3, &tensor, 0, &mut out);
    out.into_iter().map(f64::from).collect()
}

fn parameters(model: &ModelSpec) -> Tensors {
    let near_one = |t: &TensorSpec, x: f64| if t.decays() { x } else { 1.0 + x };
    let fill = |t: &TensorSpec| {
        values(&t.name, t.num_elements() as usize).into_iter().map(|x| near_one(t, x)).collect()
    };
    model.tensors().iter().map(|t| (t.name.clone(), fill(t))).collect()
}

fn input_of(model: &ModelSpec, layer: u32) -> Input {
    match model.layer_kind(layer) {
        LayerKind::Embedding => Input::Ids(vec![1, 4, 4, 10, 0, 7, 2, 1, 9, 3]),
        _ => Input::Hidden(values("input", SAMPLES * SEQ_LEN * model.hidden_size as usize)),
    }
}

const LABELS: [usize; SAMPLES * SEQ_LEN] = [4, 4, 10, 0, 7, 2, 1, 9, 3, 5];

/// A scalar of a layer's output: its product with fixed random numbers.
fn scalar(layer: &Layer<'_>, w: &Tensors, input: &Input) -> f64 {
    let (output, _) = layer.forward(w, input, &LABELS);
    output.iter().zip(seed(output.len())).map(|(a, b)| a * b).sum()
}

fn seed(count: usize) -> Vec<f64> {
    values("seed", count)
}

fn assert_close(analytic: f64, numeric: f64, what: &str) {
    assert!(
        (analytic - numeric).abs() < 1e-7 * (1.0 + numeric.abs()),
        "{what}: {analytic} against {numeric}"
    );
}

#[test]
fn every_layer_agrees_with_finite_differences() {
    const H: f64 = 1e-5;
    for tied in [false, true] {
        let model = model(tied);
        for index in [0, 1, 2, 3] {
            let layer = Layer { model: &model, index, seq_len: SEQ_LEN };
            let mut w = parameters(&model);
            let mut input = input_of(&model, index);
            let mut dw: Tensors = w.iter().map(|(name, w)| (name.clone(), vec![0.0; w.len()])).collect();
            let (output, saved) = layer.forward(&w, &input, &LABELS);
            let dx = layer.backward(&w, &input, &saved, &seed(output.len()), &mut dw);

            for (at, dx) in dx.iter().enumerate() {
                let mut moved = |by: f64| {
                    if let Input::Hidden(x) = &mut input {
                        x[at] += by;
                    }
                    scalar(&layer, &w, &input)
                };
                let (up, down) = (moved(H), moved(-2.0 * H));
                moved(H);
                assert_close(*dx, (up - down) / (2.0 * H), &format!("layer {index} input {at}"));
            }
            for (name, dw) in &dw {
                for at in (0..dw.len()).step_by(dw.len().div_ceil(9)) {
                    let mut moved = |by: f64| {
                        w.get_mut(name).unwrap()[at] += by;
                        scalar(&layer, &w, &input)
                    };
                    let (up, down) = (moved(H), moved(-2.0 * H));
                    moved(H);
                    assert_close(dw[at], (up - down) / (2.0 * H), &format!("layer {index} {name} {at}"));
                }
            }
        }
    }
}

#[test]
fn a_later_token_and_another_sample_change_nothing_earlier() {
    let model = model(false);
    let w = parameters(&model);
    let layer = Layer { model: &model, index: 1, seq_len: SEQ_LEN };
    let Input::Hidden(mut x) = input_of(&model, 1) else { panic!("a block reads hidden states") };
    let (before, _) = layer.forward(&w, &Input::Hidden(x.clone()), &[]);
    let width = model.hidden_size as usize;
    x[3 * width..].iter_mut().for_each(|x| *x += 0.5);
    let (after, _) = layer.forward(&w, &Input::Hidden(x), &[]);
    assert_eq!(before[..3 * width], after[..3 * width]);
    assert_ne!(before[3 * width..4 * width], after[3 * width..4 * width]);
}

#[test]
fn attention_sees_relative_positions_only() {
    // Two equal keys ahead of a query get weights that do not change when all positions move.
    let frequencies = model(false).inverse_frequencies();
    let (q, k) = (values("q", 4), values("k", 4));
    let score = |q_position: usize, k_position: usize| {
        let place = |x: &[f64], position: usize| {
            let mut all = vec![0.0; 4 * 16];
            all[position * 4..][..4].copy_from_slice(x);
            super::operators::rotate(&mut all, 16, 1, &frequencies, 1.0);
            all[position * 4..][..4].to_vec()
        };
        place(&q, q_position).iter().zip(place(&k, k_position)).map(|(a, b)| a * b).sum::<f64>()
    };
    assert!((score(5, 2) - score(12, 9)).abs() < 1e-12);
    assert!((score(5, 2) - score(5, 3)).abs() > 1e-3);
}

#[test]
fn grouped_heads_equal_full_heads_with_repeated_keys_and_values() {
    let grouped = model(false);
    let full = ModelSpec { num_kv_heads: 4, ..grouped.clone() };
    let (w, mut repeated) = (parameters(&grouped), parameters(&grouped));
    for suffix in ["k_proj", "v_proj"] {
        let name = format!("model.layers.0.self_attn.{suffix}.weight");
        let head = 4 * grouped.hidden_size as usize;
        let twice = w[&name].chunks_exact(head).flat_map(|head| [head, head].concat()).collect();
        repeated.insert(name, twice);
    }
    let input = input_of(&grouped, 1);
    let of = |model: &ModelSpec, w: &Tensors| {
        Layer { model, index: 1, seq_len: SEQ_LEN }.forward(w, &input, &[]).0
    };
    assert_eq!(of(&grouped, &w), of(&full, &repeated));
}

#[test]
fn equal_logits_lose_the_logarithm_of_the_vocabulary() {
    let model = model(false);
    let mut w = parameters(&model);
    w.get_mut("lm_head.weight").unwrap().fill(0.0);
    let layer = Layer { model: &model, index: 3, seq_len: SEQ_LEN };
    let (loss, _) = layer.forward(&w, &input_of(&model, 3), &LABELS);
    assert!((loss[0] - LABELS.len() as f64 * 11f64.ln()).abs() < 1e-12);
}

// Through the engine interface.

fn engine(model: &ModelSpec, cuts: &[u32], recompute: bool) -> ReferenceEngine {
    let mut engine = ReferenceEngine::new();
    let stages: Vec<StageLoad> = (0..)
        .zip(cuts.windows(2))
        .map(|(stage, cut)| StageLoad {
            stage: StageId(stage),
            model: model.clone(),
            layers: cut[0]..cut[1],
            recompute,
        })
        .collect();
    engine.load(&stages).unwrap();
    let w = parameters(model);
    for load in &stages {
        let rows: Vec<ImportRows> = model
            .stage_tensors(load.layers.clone())
            .iter()
            .map(|(_, t)| {
                let values = w[&t.name].iter().map(|x| *x as f32).collect();
                ImportRows { lease: Lease::of_f32(&t.name, t.shape.clone(), values), first_row: 0 }
            })
            .collect();
        engine.import(load.stage, &rows).unwrap();
    }
    engine
}

fn ids(shift: i32) -> Lease {
    let ids = (0..(SAMPLES * SEQ_LEN) as i32).map(|i| (i * i + shift) % 11).collect();
    Lease::of_i32("input_ids", vec![SAMPLES as u64, SEQ_LEN as u64], ids)
}

fn labels() -> Lease {
    let labels = LABELS.iter().map(|x| *x as i32).collect();
    Lease::of_i32("labels", vec![SAMPLES as u64, SEQ_LEN as u64], labels)
}

fn done(ticket: Ticket<Edge>) -> Edge {
    match ticket {
        Ticket::Ready(edge) => edge,
        Ticket::Pending(_) => panic!("the reference engine is synchronous"),
    }
}

/// Loss and gradients of `count` micro-batches over all stages, all in flight at once.
fn train(engine: &mut ReferenceEngine, stages: u32, count: i32) -> (f32, Vec<(u32, String, Vec<f32>)>) {
    let mut loss = 0.0;
    for number in 0..count {
        let mut edge = Edge::new(vec![ids(number)]);
        for stage in 0..stages {
            if stage + 1 == stages {
                edge.tensors.push(labels());
            }
            edge = done(engine.forward(StageId(stage), number as u32, edge).unwrap());
        }
        loss += edge.take("loss_sum").unwrap().as_f32().unwrap()[0];
    }
    let mut found = Vec::new();
    for number in 0..count {
        let mut gradient = Edge::default();
        for stage in (0..stages).rev() {
            let mut ready = |layer: u32, leases: Vec<Lease>| {
                found.extend(
                    leases.into_iter().map(|l| (layer, l.name.clone(), l.as_f32().unwrap().to_vec())),
                );
                Ok(())
            };
            let ready: Option<&mut GradientReady<'_>> =
                if number + 1 == count { Some(&mut ready) } else { None };
            let part = BackwardPart::Full;
            gradient = done(engine.backward(StageId(stage), number as u32, part, gradient, ready).unwrap());
        }
        assert!(gradient.tensors.is_empty());
    }
    (loss, found)
}

#[test]
fn stages_and_recompute_change_nothing_and_layers_report_from_the_last() {
    let model = model(false);
    let (loss, whole) = train(&mut engine(&model, &[0, 4], false), 1, 3);
    assert!(whole.windows(2).all(|pair| pair[0].0 >= pair[1].0));
    assert_eq!(whole.len(), model.tensors().len());
    assert_eq!((loss, whole.clone()), train(&mut engine(&model, &[0, 4], true), 1, 3));
    let (split_loss, split) = train(&mut engine(&model, &[0, 2, 4], false), 2, 3);
    assert!((loss - split_loss).abs() < 1e-4);
    for ((_, name, a), (_, split_name, b)) in whole.iter().zip(&split) {
        assert_eq!(name, split_name);
        let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
        // Only the rounding of the edges to f32 lies between the two.
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * largest), "{name}");
    }
}

#[test]
fn a_tied_embedding_reports_once_with_both_ends() {
    let (_, whole) = train(&mut engine(&model(true), &[0, 4], false), 1, 1);
    let found: Vec<_> = whole.iter().filter(|(_, name, _)| name == EMBEDDING).collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, 0);
    let (_, split) = train(&mut engine(&model(true), &[0, 2, 4], false), 2, 1);
    let ends: Vec<_> = split.iter().filter(|(_, name, _)| name == EMBEDDING).collect();
    assert_eq!(ends.iter().map(|(layer, ..)| *layer).collect::<Vec<_>>(), [3, 0]);
    for (at, sum) in found[0].2.iter().enumerate() {
        assert!((sum - ends[0].2[at] - ends[1].2[at]).abs() < 1e-5);
    }
}

#[test]
fn export_answers_with_the_imported_bits_and_rows_land_where_they_belong() {
    let model = model(false);
    let mut engine = engine(&model, &[0, 4], false);
    let name = "model.layers.1.mlp.up_proj.weight".to_owned();
    let rows = Lease::of_f32(&name, vec![2, 8], (0..16).map(|i| i as f32 * 0.1).collect());
    engine.import(StageId(0), &[ImportRows { lease: rows, first_row: 7 }]).unwrap();
    let out = engine.export(StageId(0), std::slice::from_ref(&name)).unwrap();
    let mut expected: Vec<f32> = parameters(&model)[&name].iter().map(|x| *x as f32).collect();
    for i in 0..16 {
        expected[7 * 8 + i] = i as f32 * 0.1;
    }
    assert_eq!(out[0].as_f32().unwrap(), expected);
    let beyond = Lease::of_f32(&name, vec![2, 8], vec![0.0; 16]);
    let error = engine.import(StageId(0), &[ImportRows { lease: beyond, first_row: 11 }]).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
}

#[test]
fn a_dropped_micro_batch_never_counts() {
    let model = model(false);
    let (_, expected) = train(&mut engine(&model, &[0, 4], false), 1, 1);
    let mut engine = engine(&model, &[0, 4], false);
    engine.forward(StageId(0), 9, Edge::new(vec![ids(5), labels()])).unwrap();
    engine.drop_micro_batch(9).unwrap();
    assert_eq!(train(&mut engine, 1, 1).1, expected);
    assert!(engine.backward(StageId(0), 9, BackwardPart::Full, Edge::default(), None).is_err());
}

#[test]
fn bad_input_is_an_error_that_says_what_is_wrong() {
    let mut engine = engine(&model(false), &[0, 4], false);
    let mut message = |inputs: Vec<Lease>| match engine.forward(StageId(0), 0, Edge::new(inputs)) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    let token = Lease::of_i32("input_ids", vec![1, 2], vec![0, 11]);
    assert!(message(vec![token, labels()]).contains("token 11 is not below 11"));
    assert!(message(vec![ids(0)]).contains("without `labels`"));
    let floats = Lease::of_f32("input_ids", vec![1, 2], vec![0.0; 2]);
    assert!(message(vec![floats, labels()]).contains(DType::I32.name()));
    let short = Lease::of_i32("labels", vec![1, 2], vec![0, 1]);
    assert!(message(vec![ids(0), short]).contains("labels are [1, 2]"));
}

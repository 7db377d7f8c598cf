use std::sync::Arc;

use hgct_core::model::TensorSpec;
use proptest::prelude::*;

use crate::engine::Lease;

use super::{AdamW, OwnedSlice, Slot, UpdateStep, add_contribution, clip_factor, sum_in_tree};

const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

fn step(number: u64) -> UpdateStep {
    UpdateStep { number, learning_rate: 1e-2, scale: 0.25, clip_factor: 0.5 }
}

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let spec = TensorSpec { name: format!("numbers {seed}"), shape: vec![1, count as u64] };
    let mut out = vec![0f32; count];
    let config = r#"{"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "initializer_range": 0.3}"#;
    let model = hgct_core::model::ModelSpec::from_config_json("config.json", config).unwrap();
    hgct_core::init::fill(&model, seed, &spec, 0, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn five_steps_with_clipping_agree_with_pytorch() {
    // torch.optim.AdamW in float64 (2.15.0): lr 1e-2, betas (0.9, 0.95), eps 1e-8, weight decay
    // 0.1 on the first tensor and 0 on the second, clip_grad_norm_ to 0.5 over both.
    const MATRIX: [f64; 6] = [
        0.476_114_801_654_574_5,
        -1.214_893_370_813_867_6,
        2.974_911_015_798_833_4,
        0.000_171_427_605_743_191_97,
        0.015_059_142_696_663_011,
        -1.987_012_232_112_325_6,
    ];
    const NORM: [f64; 2] = [1.002_506_649_233_832_8, 0.743_268_830_155_406_3];
    const TOKENS: f32 = 4.0;

    let matrix = TensorSpec { name: "matrix".into(), shape: vec![2, 3] };
    let norm = TensorSpec { name: "norm".into(), shape: vec![2] };
    let mut matrix = OwnedSlice::new(&matrix, 0..2, 8, 1);
    let mut norm = OwnedSlice::new(&norm, 0..2, 8, 1);
    matrix.state_mut(Slot(0)).parameter = vec![0.5, -1.25, 3.0, 0.0, 1e-3, -2.0].into();
    norm.state_mut(Slot(0)).parameter = vec![1.0, 0.75].into();
    for number in 1..=5 {
        let gradient = |i: u64, a: u64, b: u64, n: u64| {
            (((i * a + number * b) % n) as f32 - (n / 2) as f32) / 10.0 * TOKENS
        };
        matrix.contribute(&(0..6).map(|i| gradient(i, 7, 5, 11)).collect::<Vec<_>>()).unwrap();
        norm.contribute(&(0..2).map(|i| gradient(i, 3, 2, 7)).collect::<Vec<_>>()).unwrap();
        let squares = [matrix.squared_norms(), norm.squared_norms()].concat();
        let scale = 1.0 / f64::from(TOKENS);
        let clip_factor = clip_factor(sum_in_tree(&squares).sqrt() * scale, 0.5);
        assert!(clip_factor < 1.0);
        let step = UpdateStep { number, learning_rate: 1e-2, scale, clip_factor };
        matrix.update(&ADAMW, &step, Slot(0), Slot(0));
        norm.update(&ADAMW, &step, Slot(0), Slot(0));
    }
    for (found, expected) in [(&matrix, &MATRIX[..]), (&norm, &NORM[..])] {
        for (found, expected) in found.state(Slot(0)).parameter.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} against {expected}");
        }
    }
}

#[test]
fn norms_and_biases_do_not_decay() {
    let with_zero_gradient = |shape: &[u64]| {
        let tensor = TensorSpec { name: "t".into(), shape: shape.to_vec() };
        let mut slice = OwnedSlice::new(&tensor, 0..2, 2, 1);
        slice.state_mut(Slot(0)).parameter.fill(1.0);
        slice.contribute(&[0.0; 2]).unwrap();
        slice.update(&ADAMW, &step(1), Slot(0), Slot(0));
        slice.state(Slot(0)).parameter[0]
    };
    assert_eq!(with_zero_gradient(&[2]).to_bits(), 1f32.to_bits());
    assert_eq!(with_zero_gradient(&[2, 1]).to_bits(), 0.999f32.to_bits());
}

#[test]
fn a_spare_slot_leaves_the_source_as_it_was() {
    let tensor = TensorSpec { name: "t".into(), shape: vec![4, 5] };
    let mut one = OwnedSlice::new(&tensor, 0..4, 20, 1);
    let mut two = OwnedSlice::new(&tensor, 0..4, 20, 2);
    for slice in [&mut one, &mut two] {
        slice.state_mut(Slot(0)).parameter = numbers(20, 1).into();
        slice.contribute(&numbers(20, 2)).unwrap();
    }
    let before = two.state(Slot(0)).clone();
    one.update(&ADAMW, &step(3), Slot(0), Slot(0));
    two.update(&ADAMW, &step(3), Slot(0), Slot(1));
    assert_eq!(two.state(Slot(0)), &before);
    assert_eq!(two.state(Slot(1)), one.state(Slot(0)));
    assert_ne!(&before, one.state(Slot(0)));
}

#[test]
fn the_first_contribution_of_a_step_replaces_the_last_step() {
    let tensor = TensorSpec { name: "t".into(), shape: vec![2] };
    let mut slice = OwnedSlice::new(&tensor, 0..2, 2, 1);
    slice.contribute(&[1.0, 2.0]).unwrap();
    slice.contribute(&[0.5, 0.25]).unwrap();
    assert_eq!(slice.gradient(), [1.5, 2.25]);
    slice.forget_gradient();
    slice.contribute(&[1.0, 2.0]).unwrap();
    assert_eq!(slice.gradient(), [1.0, 2.0]);
    let error = slice.contribute(&[1.0]).unwrap_err();
    assert!(matches!(error, crate::Error::Plan(_)));
}

#[test]
fn a_snapshot_keeps_what_it_saw_and_shares_what_did_not_change() {
    let tensor = TensorSpec { name: "t".into(), shape: vec![4, 5] };
    let mut slice = OwnedSlice::new(&tensor, 0..4, 20, 1);
    slice.state_mut(Slot(0)).parameter = numbers(20, 1).into();
    let snapshot = slice.state(Slot(0)).clone();
    assert_eq!(snapshot.m.as_ptr(), slice.state(Slot(0)).m.as_ptr(), "the snapshot is a copy");
    slice.contribute(&numbers(20, 2)).unwrap();
    slice.update(&ADAMW, &step(1), Slot(0), Slot(0));
    assert_eq!(bits(&snapshot.parameter), bits(&numbers(20, 1)));
    assert_ne!(slice.state(Slot(0)), &snapshot);
    let address = slice.state(Slot(0)).parameter.as_ptr();
    slice.contribute(&numbers(20, 2)).unwrap();
    slice.update(&ADAMW, &step(2), Slot(0), Slot(0));
    assert_eq!(slice.state(Slot(0)).parameter.as_ptr(), address, "copied without need");
}

#[test]
fn a_lent_contribution_counts_like_a_copied_one() {
    let tensor = TensorSpec { name: "t".into(), shape: vec![4, 5] };
    let lease = Arc::new(Lease::of_f32("t", vec![6, 5], numbers(30, 2)));
    let slice = |lent: bool, further: bool| {
        let mut slice = OwnedSlice::new(&tensor, 0..4, 20, 1);
        slice.state_mut(Slot(0)).parameter.copy_from_slice(&numbers(20, 1));
        for number in 1..=2 {
            if lent {
                slice.contribute_lent(&lease, 5..25).unwrap();
            } else {
                slice.contribute(&numbers(30, 2)[5..25]).unwrap();
            }
            if further {
                slice.contribute(&numbers(20, 3)).unwrap();
            }
            let squares = slice.squared_norms();
            assert!(squares.iter().sum::<f64>() > 0.0);
            slice.update(&ADAMW, &step(number), Slot(0), Slot(0));
        }
        (bits(&slice.state(Slot(0)).parameter), bits(&slice.state(Slot(0)).v))
    };
    assert_eq!(slice(true, false), slice(false, false));
    assert_eq!(slice(true, true), slice(false, true));
    assert_eq!(Arc::strong_count(&lease), 1, "the engine's memory is still held after the update");
    let mut short = OwnedSlice::new(&tensor, 0..4, 20, 1);
    assert!(short.contribute_lent(&lease, 20..45).is_err());
}

/// Length, seeds and row cuts.
fn cases() -> impl Strategy<Value = (u64, u64, Vec<u64>)> {
    (1u64..40, 1u64..40)
        .prop_flat_map(|(rows, width)| (Just(rows), Just(width), proptest::collection::vec(0..=rows, 0..4)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn splitting_rows_changes_no_bit((rows, width, mut cuts) in cases(), number in 1u64..1000) {
        let tensor = TensorSpec { name: "t".into(), shape: vec![rows, width] };
        cuts.extend([0, rows]);
        cuts.sort_unstable();
        let (parameter, gradient) = (numbers((rows * width) as usize, 1), numbers((rows * width) as usize, 2));
        let run = |cuts: &[u64]| {
            let mut found: [Vec<u32>; 3] = Default::default();
            for cut in cuts.windows(2) {
                let range = (cut[0] * width) as usize..(cut[1] * width) as usize;
                let mut slice = OwnedSlice::new(&tensor, cut[0]..cut[1], 1, 1);
                slice.state_mut(Slot(0)).parameter.copy_from_slice(&parameter[range.clone()]);
                slice.contribute(&gradient[range.clone()]).unwrap();
                slice.contribute(&parameter[range]).unwrap();
                slice.update(&ADAMW, &step(number), Slot(0), Slot(0));
                let state = slice.state(Slot(0));
                for (found, part) in found.iter_mut().zip([&state.parameter, &state.m, &state.v]) {
                    found.extend(bits(part));
                }
            }
            found
        };
        prop_assert_eq!(run(&cuts), run(&[0, rows]));
    }

    #[test]
    fn vector_width_changes_no_bit(count in 0usize..200, number in 1u64..100_000) {
        let c = ADAMW.coefficients(&step(number), true);
        let start = || (numbers(count, 1), numbers(count, 2), numbers(count, 3).iter().map(|x| x.abs()).collect::<Vec<_>>());
        let gradient = numbers(count, 4);
        let (mut wide, mut narrow) = (start(), start());
        super::kernel::update(&c, (&mut wide.0, &mut wide.1, &mut wide.2), &gradient);
        for i in 0..count {
            let one = |all| std::slice::from_mut::<f32>(std::hint::black_box(&mut <Vec<f32> as AsMut<[f32]>>::as_mut(all)[i]));
            super::kernel::update_elements(&c, (one(&mut narrow.0), one(&mut narrow.1), one(&mut narrow.2)), &gradient[i..=i]);
        }
        for (a, b) in [(&wide.0, &narrow.0), (&wide.1, &narrow.1), (&wide.2, &narrow.2)] {
            prop_assert_eq!(bits(a), bits(b));
        }
    }

    #[test]
    fn norms_of_blocks_do_not_depend_on_the_owner(rows in 1u64..60, at in 0u64..60) {
        // Blocks of one row: a row holds more than 65,536 elements.
        let width = 65_600;
        let tensor = TensorSpec { name: "t".into(), shape: vec![rows.min(4), width] };
        let rows = tensor.rows();
        let values = numbers((rows * width) as usize, 5);
        let at = at.min(rows);
        let of = |range: std::ops::Range<u64>| {
            let elements = (range.start * width) as usize..(range.end * width) as usize;
            super::squared_norm_blocks(&tensor, 1, &range, &values[elements])
        };
        let whole = of(0..rows);
        prop_assert_eq!(&[of(0..at), of(at..rows)].concat(), &whole);
        let plain: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
        prop_assert!((sum_in_tree(&whole) / plain - 1.0).abs() < 1e-12);
    }
}

#[test]
fn denormals_survive_a_thread_that_flushes_them() {
    let tiny = || vec![f32::MIN_POSITIVE / 4.0; 8];
    let sum = |mut values: Vec<f32>| {
        add_contribution(&mut values, &tiny());
        values
    };
    let expected = bits(&sum(tiny()));
    assert_ne!(expected[0], 0);
    #[cfg(target_arch = "x86_64")]
    {
        let before = super::environment::control_word();
        super::environment::set_control_word(before | 0x8040);
        let found = bits(&sum(tiny()));
        let during = super::environment::control_word();
        super::environment::set_control_word(before);
        assert_eq!(found, expected);
        assert_eq!(during & 0x8040, 0x8040, "the thread's own setting comes back");
    }
}

#[test]
fn clipping_leaves_small_norms_alone() {
    assert_eq!(clip_factor(0.5, 1.0).to_bits(), 1f64.to_bits());
    assert_eq!(clip_factor(1e9, 0.0).to_bits(), 1f64.to_bits());
    assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
}

#[test]
fn powers_agree_with_repeated_multiplication() {
    for (exponent, expected) in [(0, 1.0), (1, 0.9), (2, 0.81), (10, 0.348_678_440_1)] {
        assert!((super::power(0.9, exponent) - expected).abs() < 1e-15);
    }
}

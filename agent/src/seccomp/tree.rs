//! The plain part of a filter: system calls whose number alone decides, found by a binary search.
//!
//! That is nearly all of a profile, and libseccomp takes milliseconds over it for each container.

use super::dispatch::{NUMBER, always, jump, load, returning};

/// Numbers from `first` up to the next segment's: what to return for them, or nothing, if more has to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    first: u32,
    action: Option<u32>,
}

/// Instructions that return the action of these numbers and fall through for all others. Sorted, each number once.
pub fn program(actions: &[(u32, u32)]) -> Vec<libc::sock_filter> {
    if actions.is_empty() {
        return Vec::new();
    }
    let mut program = vec![load(NUMBER)];
    let (search, open) = search(&segments(actions));
    let end = search.len();
    program.extend(search);
    for place in open {
        // From behind the instruction to behind the last.
        if let Some(instruction) = program.get_mut(place + 1) {
            *instruction = always(end - place - 1);
        }
    }
    program
}

fn segments(actions: &[(u32, u32)]) -> Vec<Segment> {
    let mut segments = vec![Segment {
        first: 0,
        action: None,
    }];
    let mut begin = |first, action| {
        if let Some(last) = segments.last_mut()
            && last.first == first
        {
            last.action = action;
        } else {
            segments.push(Segment { first, action });
        }
    };
    for &(number, action) in actions {
        begin(number, Some(action));
        if let Some(next) = number.checked_add(1) {
            begin(next, None);
        }
    }
    merge(segments)
}

/// Takes out the borders between segments of one answer.
fn merge(segments: Vec<Segment>) -> Vec<Segment> {
    let mut merged: Vec<Segment> = Vec::with_capacity(segments.len());
    for segment in segments {
        if merged
            .last()
            .is_none_or(|last| last.action != segment.action)
        {
            merged.push(segment);
        }
    }
    merged
}

/// The search among some segments, and where in it jumps to its end are missing.
fn search(segments: &[Segment]) -> (Vec<libc::sock_filter>, Vec<usize>) {
    let (low, high) = segments.split_at(segments.len() / 2);
    let (Some(_), Some(border)) = (low.first(), high.first()) else {
        return match high.first().and_then(|segment| segment.action) {
            Some(action) => (vec![returning(action)], Vec::new()),
            None => (vec![always(0)], vec![0]),
        };
    };
    let (below, open_below) = search(low);
    let (above, open_above) = search(high);
    let mut program = match u8::try_from(below.len()) {
        Ok(skip) => vec![jump(libc::BPF_JGE, border.first, skip, 0)],
        Err(_) => vec![jump(libc::BPF_JGE, border.first, 0, 1), always(below.len())],
    };
    let mut open = Vec::with_capacity(open_below.len() + open_above.len());
    open.extend(open_below.into_iter().map(|place| place + program.len()));
    program.extend(below);
    open.extend(open_above.into_iter().map(|place| place + program.len()));
    program.extend(above);
    (program, open)
}

#[cfg(test)]
mod tests {
    use super::super::dispatch::tests::result;
    use super::*;

    const OTHER: u32 = 77;

    fn answer(actions: &[(u32, u32)], number: u32) -> u32 {
        let mut program = program(actions);
        program.push(returning(OTHER));
        result(&program, 0, number, [0; 6])
    }

    #[test]
    fn every_number_gets_its_own_answer() {
        let sparse: Vec<_> = (0..2000)
            .step_by(3)
            .map(|number| (number, number))
            .collect();
        let dense: Vec<_> = (5..900).map(|number| (number, number / 100)).collect();
        let ends = vec![(0, 1), (u32::MAX - 1, 2), (u32::MAX, 3)];
        for actions in [sparse, dense, ends, vec![(7, 1)]] {
            let near = (0..2100).chain(u32::MAX - 3..=u32::MAX);
            for number in near {
                let expected = actions
                    .iter()
                    .find(|(listed, _)| *listed == number)
                    .map_or(OTHER, |(_, action)| *action);
                assert_eq!(answer(&actions, number), expected, "{number}");
            }
        }
    }

    #[test]
    fn neighbours_with_one_answer_are_one_segment() {
        let allowed: Vec<_> = (10..400).map(|number| (number, 1)).collect();
        assert_eq!(segments(&allowed).len(), 3);
        assert!(program(&allowed).len() < 10);
        assert!(program(&[]).is_empty());
    }
}

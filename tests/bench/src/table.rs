//! Medians, comparisons with their goals, and tables in Markdown as the README shows them.

/// The middle value; the mean of the middle two when their number is even.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.len() % 2) {
        (Some(&value), 1) => value,
        (Some(&value), _) => (value + sorted[middle - 1]) / 2.0,
        (None, _) => f64::NAN,
    }
}

/// Prints a table with a title above it.
pub fn print(title: &str, header: &[&str], rows: &[Vec<String>]) {
    println!("\n{title}\n");
    println!("| {} |", header.join(" | "));
    println!("|{}", " --- |".repeat(header.len()));
    for row in rows {
        println!("| {} |", row.join(" | "));
    }
}

/// How a comparison is shown.
#[derive(Debug, Clone, PartialEq)]
pub enum Measure {
    /// The time it took. The ratio is Bulkhead's time by the peer's.
    Time,
    /// This much of that unit by the time it took. The ratio is Bulkhead's rate by the peer's.
    Rate(f64, String),
}

/// What the ratio is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Of times.
    AtMost(f64),
    /// Of rates.
    AtLeast(f64),
}

impl Goal {
    fn told(self, ratio: f64) -> String {
        let (words, met) = match self {
            Self::AtMost(limit) => (format!("at most {limit}"), ratio <= limit),
            Self::AtLeast(limit) => (format!("at least {limit}"), ratio >= limit),
        };
        format!("{words}: {}", if met { "met" } else { "**missed**" })
    }
}

/// One row: the same done by Bulkhead and by a peer, in alternation.
#[derive(Debug)]
pub struct Comparison {
    /// What was done.
    pub what: String,
    /// The other program.
    pub peer: &'static str,
    /// How it is shown.
    pub measure: Measure,
    /// What is aimed at, if anything is.
    pub goal: Option<Goal>,
    /// Bulkhead's seconds, one for each round.
    pub ours: Vec<f64>,
    /// The peer's.
    pub theirs: Vec<f64>,
}

impl Comparison {
    const HEADER: &[&str] = &["what", "bulkhead", "peer", "bulkhead by peer", "goal"];

    fn row(&self) -> Vec<String> {
        let (ours, theirs) = (median(&self.ours), median(&self.theirs));
        let ratio = match self.measure {
            Measure::Time => ours / theirs,
            Measure::Rate(..) => theirs / ours,
        };
        vec![
            self.what.clone(),
            self.shown(ours),
            format!("{} {}", self.peer, self.shown(theirs)),
            format!("{ratio:.2}"),
            self.goal.map_or_else(String::new, |goal| goal.told(ratio)),
        ]
    }

    fn shown(&self, seconds: f64) -> String {
        match &self.measure {
            Measure::Time => format!("{seconds:.2} s"),
            Measure::Rate(amount, unit) => {
                let rate = amount / seconds;
                let digits = if rate < 10.0 { 1 } else { 0 };
                format!("{rate:.digits$} {unit}/s")
            }
        }
    }
}

/// Prints all comparisons as one table.
pub fn print_comparisons(comparisons: &[Comparison], rounds: usize) {
    let rows: Vec<_> = comparisons.iter().map(Comparison::row).collect();
    let title = format!("Bulkhead beside its peers, medians of {rounds}");
    print(&title, Comparison::HEADER, &rows);
}

#[cfg(test)]
mod tests {
    use super::{Comparison, Goal, Measure, median};

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_middles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    fn comparison(measure: Measure, goal: Option<Goal>, ours: f64, theirs: f64) -> Comparison {
        Comparison {
            what: "work".to_owned(),
            peer: "runc",
            measure,
            goal,
            ours: vec![ours],
            theirs: vec![theirs],
        }
    }

    #[test]
    fn a_time_above_its_goal_is_missed_and_one_at_it_is_met() {
        let goal = Some(Goal::AtMost(2.0));
        let row = comparison(Measure::Time, goal, 4.2, 2.0).row();
        assert_eq!(
            row,
            [
                "work",
                "4.20 s",
                "runc 2.00 s",
                "2.10",
                "at most 2: **missed**"
            ]
        );
        let row = comparison(Measure::Time, goal, 4.0, 2.0).row();
        assert_eq!(row[3..], ["2.00", "at most 2: met"]);
    }

    #[test]
    fn a_rate_below_its_goal_is_missed_and_one_at_it_is_met() {
        let rate = || Measure::Rate(64.0, "MiB".to_owned());
        let goal = Some(Goal::AtLeast(0.5));
        let row = comparison(rate(), goal, 16.0, 4.0).row();
        assert_eq!(
            row,
            [
                "work",
                "4.0 MiB/s",
                "runc 16 MiB/s",
                "0.25",
                "at least 0.5: **missed**"
            ]
        );
        let row = comparison(rate(), goal, 8.0, 4.0).row();
        assert_eq!(row[3..], ["0.50", "at least 0.5: met"]);
    }

    #[test]
    fn what_could_not_be_measured_meets_no_goal() {
        for goal in [Goal::AtMost(2.0), Goal::AtLeast(0.5)] {
            assert!(goal.told(f64::NAN).ends_with("**missed**"));
        }
    }
}

//! What processes are on their way to the program: under strict profiles, scheduled, with keyrings; and how all of them end.

use serde_json::json;

use crate::bed::Bed;

pub async fn a_hook_may_have_all_the_time_there_is() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("true");
    spec["hooks"] = json!({"startContainer": [{"path": "/bin/true", "timeout": i64::MAX}]});
    assert_eq!(bed.output(&spec).await, "");
}

"""A lifecycle node that survives wrong transitions."""

from __future__ import annotations

from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.lifecycle import LifecycleNode

from ceed_vla.texts import shown


class SafeLifecycleNode(LifecycleNode):
    """Refuses a transition that the present state does not have; rclpy ends the process instead."""

    # rclpy has no hook for this: an impossible transition raises RCLError in its service, which
    # would end the node.
    def _LifecycleNodeMixin__on_change_state(  # noqa: N802 - overrides rclpy's private method
        self, request: ChangeState.Request, response: ChangeState.Response
    ) -> ChangeState.Response:
        """Handle ~/change_state; refuse a transition that the present state does not have."""
        wanted = request.transition.label or request.transition.id
        possible = {
            label: number for number, label, *_ in self._state_machine.available_transitions
        }
        if wanted not in possible and wanted not in possible.values():
            current = self._state_machine.current_state[1]
            self.get_logger().warning(
                f"Refused the lifecycle transition {shown(wanted)}: the node is {current}; it can "
                f"{', '.join(f'{label} ({number})' for label, number in sorted(possible.items()))}."
            )
            response.success = False
            return response
        inherited: Any = super()
        answer: ChangeState.Response = inherited._LifecycleNodeMixin__on_change_state(
            request, response
        )
        return answer
